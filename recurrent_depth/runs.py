"""The layout of a run folder, and reading a model from it.

RUN/run.yaml                     the resolved configuration
RUN/metrics.jsonl                one line a log event
RUN/tokenizer.json               if the data has one
RUN/checkpoints/step-00000100/   safetensors shards of model and optimizer, and checkpoint.json, written last
"""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader

from recurrent_depth.errors import UserError
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.transformer import RecurrentDepthModel

CHECKPOINT_FILE = "checkpoint.json"
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing, damaged or of another model."""


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run folder, oldest first."""
    found = [p for p in (run / "checkpoints").glob("step-*") if _NAME.fullmatch(p.name)]
    return sorted((p for p in found if (p / CHECKPOINT_FILE).is_file()), key=lambda p: int(p.name.split("-")[1]))


def is_run(path: str | Path) -> bool:
    """Whether `path` is a run folder or one of its checkpoints."""
    path = Path(path)
    return (path / CHECKPOINT_FILE).is_file() or (path / "checkpoints").is_dir()


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that `path` names: itself, or the newest of a run."""
    path = Path(path)
    if (path / CHECKPOINT_FILE).is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise CheckpointError(f"{path} holds no complete checkpoint; train first, or name a folder step-NNNNNNNN")
    return found[-1]


def read_details(checkpoint: Path) -> dict[str, Any]:
    """checkpoint.json: step, model shape, fingerprints, checksums."""
    try:
        return json.loads((checkpoint / CHECKPOINT_FILE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{checkpoint / CHECKPOINT_FILE} cannot be read ({error}); use an older checkpoint"
        ) from error


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(checkpoint: Path, files: dict[str, str] | None = None) -> None:
    """Compare every file with its checksum; a damaged checkpoint is an error that names the file."""
    for name, expected in (files or read_details(checkpoint)["files"]).items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; use an older checkpoint")
        if file_hash(path) != expected:
            raise CheckpointError(f"{path} is damaged (its checksum differs); use an older checkpoint")


def model_config(details: dict[str, Any]) -> ModelConfig:
    known = {field.name for field in fields(ModelConfig)}
    unknown = set(details["model"]) - known
    if unknown:
        raise CheckpointError(f"the checkpoint's model has fields this version does not know: {sorted(unknown)}")
    return ModelConfig(**details["model"])


@contextmanager
def one_process() -> Iterator[None]:
    """torch warns whenever a checkpoint is read or written without a process group; here that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def load_run_model(path: str | Path) -> RecurrentDepthModel:
    """The model of a run folder (newest checkpoint) or of one checkpoint, whole, in fp32 on the CPU."""
    checkpoint = find_checkpoint(path)
    details = read_details(checkpoint)
    verify(checkpoint, details["files"])
    model = RecurrentDepthModel(model_config(details))
    state = {f"model.{name}": p for name, p in model.named_parameters()}
    with torch.no_grad(), one_process():
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    return model.eval()


def run_tokenizer(path: str | Path) -> Path | None:
    """The tokenizer.json that belongs to a run or checkpoint, if it has one."""
    path = Path(path)
    candidates = [path / "tokenizer.json", path.parent.parent / "tokenizer.json"]
    return next((p for p in candidates if p.is_file()), None)
