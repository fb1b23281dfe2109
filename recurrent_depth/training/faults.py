"""Turn distributed failures into errors that name the cause and the fix: different files, a rank that hangs or died."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import recurrent_depth
from recurrent_depth.runs import CheckpointError
from recurrent_depth.training.health import TrainingAborted
from recurrent_depth.training.parallel import Ranks


def check_ranks_agree(ranks: Ranks, what: dict[str, dict[str, Any]]) -> None:
    """Raise on every rank unless all hold the same values.

    Args:
        what: a thing (code, configuration, data) to its named values.
    """
    everyone = ranks.gather(what)
    complaints = []
    for rank, seen in enumerate(everyone):
        for thing, values in everyone[0].items():
            for name in sorted(name for name in {**values, **seen[thing]} if values.get(name) != seen[thing].get(name)):
                complaints.append(f"rank {rank}, {thing}, {name}: {seen[thing].get(name)} (rank 0: {values.get(name)})")
    if complaints:
        raise TrainingAborted(
            "the ranks do not see the same files; start all of them from the same code, configuration and data. "
            + "; ".join(complaints[:10])
        )


def code_version() -> dict[str, str]:
    """torch's version and a hash of every source file of this package."""
    root = Path(recurrent_depth.__file__).parent
    hashes = {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in root.rglob("*.py")}
    return {"torch": torch.__version__, **hashes}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields as section.field."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return result


def flight_recorder(folder: Path) -> None:
    """Let NCCL and RCCL keep their last collectives and write them to `folder` when one hangs, unless the user chose.

    Must run before the process group exists. The folder must exist when something hangs, not yet now.
    """
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # its name before torch 2.9
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if "TORCH_NCCL_DEBUG_INFO_TEMP_FILE" not in os.environ and "TORCH_FR_DUMP_TEMP_FILE" not in os.environ:
        os.environ["TORCH_FR_DUMP_TEMP_FILE"] = str(folder.absolute() / "rank_")


@contextmanager
def explained(ranks: Ranks, timeout_minutes: float, recorder: Path) -> Iterator[None]:
    """Turn the errors of a collective into one that names the cause and what to do."""
    try:
        yield
    except (TrainingAborted, CheckpointError):  # these explain themselves
        raise
    except RuntimeError as error:
        text = str(error).lower()
        if ranks.world_size == 1 or not any(word in text for word in ("gloo", "nccl", "timed out", "connection")):
            raise
        if "timed out" in text or "timeout" in text:
            raise TrainingAborted(
                f"rank {ranks.rank} waited {timeout_minutes:g} minutes (runtime.timeout_minutes) for the other ranks: "
                "one of them hangs or is far behind. Look for the rank whose log is silent and at its node (storage, "
                f"GPU errors, network); on GPUs {recorder} tells which collective each rank was in (torchfrtrace). "
                f"Restart with --resume true. ({error})"
            ) from error
        raise TrainingAborted(
            f"rank {ranks.rank} lost another rank, which has died or was killed: its own error is in its log (no error "
            f"at all: out of memory, or a node that went away). Restart with --resume true. ({error})"
        ) from error
