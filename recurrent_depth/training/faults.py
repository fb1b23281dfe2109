"""Turn distributed failures (different files, a rank that hangs or died) into errors that name cause and fix."""

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
        what: the values to compare, by kind (code, configuration, data) and name.
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
    """Return the version of torch and a hash of every source file of this package."""
    root = Path(recurrent_depth.__file__).parent
    hashes = {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in root.rglob("*.py")}
    return {"torch": torch.__version__, **hashes}


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested fields as section.field."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        result |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return result


def flight_recorder(folder: Path) -> None:
    """Set the flight recorder of NCCL and RCCL to write the last collectives to `folder` when one hangs.

    Variables that the user has set are kept. Call it before the process group exists; `folder` may be created later.
    """
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # the name before torch 2.9
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if "TORCH_NCCL_DEBUG_INFO_TEMP_FILE" not in os.environ and "TORCH_FR_DUMP_TEMP_FILE" not in os.environ:
        os.environ["TORCH_FR_DUMP_TEMP_FILE"] = str(folder.absolute() / "rank_")


@contextmanager
def explained(ranks: Ranks, timeout_minutes: float, recorder: Path) -> Iterator[None]:
    """Turn errors of a collective into a `TrainingAborted` that names the cause and the fix."""
    try:
        yield
    except (TrainingAborted, CheckpointError):  # their messages name the cause already
        raise
    except RuntimeError as error:
        text = str(error).lower()
        if ranks.world_size == 1 or not any(word in text for word in ("gloo", "nccl", "timed out", "connection")):
            raise
        if "timed out" in text or "timeout" in text:
            raise TrainingAborted(
                f"rank {ranks.rank} waited {timeout_minutes:g} minutes (runtime.timeout_minutes) for the other ranks: "
                "one of them hangs or is far behind. Find the rank that has stopped logging and check its node "
                f"(storage, GPU errors, network); on GPUs {recorder} shows which collective each rank was in "
                f"(torchfrtrace). "
                f"Restart with --resume true. ({error})"
            ) from error
        raise TrainingAborted(
            f"rank {ranks.rank} lost the connection to another rank, which has died or was killed: see the log of that "
            f"rank (without an error there: out of memory, or a lost node). Restart with --resume true. ({error})"
        ) from error
