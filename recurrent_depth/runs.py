"""The layout of a run folder, and reading a model from it. Writing is in recurrent_depth/training/checkpoint.py.

RUN/run.yaml                     the resolved configuration
RUN/metrics.jsonl                one line per log event
RUN/tensorboard/                 event files, if TensorBoard is among the trackers; likewise wandb/ and wandb-id.txt
RUN/exports/step-00000100/       Hugging Face folders, if `export` asks for them
RUN/profile/steps-6-8.json       the trace of `profile`
RUN/tokenizer.json               if the data have one; beside it the settings of the folder of `init_from`, if it is
                                 the same tokenizer: tokenizer_config.json, chat_template.jinja
RUN/rewinds.json                 if the run was rewound after a loss spike
RUN/.lock                        locked by the process that writes to the folder
RUN/checkpoints/step-00000100/   one checkpoint:
    model/*.safetensors          weights, by parameter name
    optimizer/*.safetensors      moments, as NAME.MOMENT; read and verified only by a resume
    checkpoint.json              training step, model, checksums of the files; written last
"""

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from recurrent_depth.errors import UserError
from recurrent_depth.files import file_hash
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.transformer import RecurrentDepthModel

CHECKPOINT_FILE = "checkpoint.json"
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
MODEL, OPTIMIZER = "model", "optimizer"
"""Parts of a checkpoint, each a folder of safetensors files."""
USE_OLDER = "move this checkpoint out of the run to use an older one"
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing, damaged, or of another model."""


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint of a training step."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the training step in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run folder, oldest first."""
    found = [p for p in (run / "checkpoints").glob("step-*") if _NAME.fullmatch(p.name)]
    return sorted((p for p in found if (p / CHECKPOINT_FILE).is_file()), key=step_of)


def is_run(path: str | Path) -> bool:
    """Return whether `path` is a run folder or one of its checkpoints."""
    path = Path(path)
    return (path / CHECKPOINT_FILE).is_file() or (path / "checkpoints").is_dir()


def find_checkpoint(path: str | Path) -> Path:
    """Return `path` if it is a checkpoint, or the newest checkpoint of the run `path`."""
    path = Path(path)
    if (path / CHECKPOINT_FILE).is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise CheckpointError(f"{path} holds no complete checkpoint; train first, or give a folder step-NNNNNNNN")
    return found[-1]


def read_details(checkpoint: Path) -> dict[str, Any]:
    """Return the content of checkpoint.json: step, model configuration, checksums, and the fields a resume compares.

    Raises:
        CheckpointError: if the file is damaged or lacks a field.
    """
    path = checkpoint / CHECKPOINT_FILE
    try:
        details = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {USE_OLDER}") from error
    check_fields(path, details, {"step": int, "model": dict, "files": dict})
    return details


def check_fields(path: Path, record: Any, kinds: dict[str, type]) -> None:
    """Raise unless `record`, read from `path`, is an object with these fields of these types."""
    fields = record if isinstance(record, dict) else {}
    wrong = [name for name, kind in kinds.items() if not isinstance(fields.get(name), kind)]
    if wrong:
        raise CheckpointError(f"{path} has no valid {', '.join(wrong)}; restore the file, or {USE_OLDER}")


def verify(checkpoint: Path, files: dict[str, str], part: str | None = None) -> None:
    """Compare the files of a checkpoint, or of one part of it, with their checksums.

    Raises:
        CheckpointError: if a file is missing or damaged, or does not belong to the checkpoint.
    """
    folder = checkpoint / part if part else checkpoint
    found = {path.relative_to(checkpoint).as_posix() for path in folder.rglob("*.safetensors")}
    for name in sorted(found | {name for name in files if part is None or name.startswith(f"{part}/")}):
        path = checkpoint / name
        if name not in files:
            raise CheckpointError(f"{path} is not a file of this checkpoint; remove it")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {USE_OLDER}")
        if file_hash(path) != files[name]:
            raise CheckpointError(f"{path} is damaged (its checksum differs); {USE_OLDER}")


def read_part(checkpoint: Path, part: str, state: dict[str, Tensor], *, alone: bool) -> None:
    """Read one part of a checkpoint into the tensors of `state`, in place.

    Args:
        alone: read whole tensors in this process; otherwise every rank must call this and reads its shards.

    Raises:
        CheckpointError: if the files are not safetensors, or do not hold these tensors.
    """
    reader = HuggingFaceStorageReader(str(checkpoint / part))
    try:
        with one_process():
            dcp.load(state, storage_reader=reader, no_dist=alone)
    except dcp.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if not isinstance(cause, Exception):  # Ctrl-C
            raise cause from error
        raise CheckpointError(
            f"{checkpoint / part} is damaged or lacks tensors of this model ({type(cause).__name__}: {cause}); "
            f"{USE_OLDER}"
        ) from error


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, its checkpoint.json first: a partly removed one does not count as complete."""
    (path / CHECKPOINT_FILE).unlink(missing_ok=True)
    shutil.rmtree(path)


def model_config(details: dict[str, Any]) -> ModelConfig:
    """Return the model configuration that a checkpoint.json holds."""
    known = {field.name for field in fields(ModelConfig)}
    unknown = set(details["model"]) - known
    if unknown:
        raise CheckpointError(
            f"the model of the checkpoint has fields that this version does not know: {sorted(unknown)}; use the "
            "version that wrote it"
        )
    try:
        return ModelConfig(**details["model"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the model configuration of the checkpoint is invalid ({error}); {USE_OLDER}") from error


@contextmanager
def one_process() -> Iterator[None]:
    """Silence torch's warning that a checkpoint is read or written without a process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def load_run_model(path: str | Path) -> RecurrentDepthModel:
    """Return the model of a run folder (newest checkpoint) or of one checkpoint, unsharded, in fp32 on the CPU.

    The files of the optimizer are neither read nor verified.
    """
    checkpoint = find_checkpoint(path)
    details = read_details(checkpoint)
    verify(checkpoint, details["files"], MODEL)
    model = RecurrentDepthModel(model_config(details))
    with torch.no_grad():
        read_part(checkpoint, MODEL, dict(model.named_parameters()), alone=True)
    return model.eval()


def copy_tokenizer_settings(source: Path, folder: Path) -> None:
    """Copy special tokens and chat template of `source` to `folder`, if both have the same tokenizer.json."""
    here, there = (_json_or_none(path / "tokenizer.json") for path in (folder, source))
    if here is not None and here == there:
        for name in TOKENIZER_SETTINGS:
            if (source / name).is_file():
                shutil.copy(source / name, folder / name)


def _json_or_none(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def run_tokenizer(path: str | Path) -> Path | None:
    """Return the path of the tokenizer.json of a run or checkpoint; None if it has none."""
    path = Path(path)
    candidates = [path / "tokenizer.json", path.parent.parent / "tokenizer.json"]
    return next((p for p in candidates if p.is_file()), None)
