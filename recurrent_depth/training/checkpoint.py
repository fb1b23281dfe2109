"""Saving and loading the state of a run: whole or not at all.

Every rank writes its shards as safetensors (no pickle anywhere) into a temporary folder; checkpoint.json, with a
checksum of every file, is written last and the folder renamed. A checkpoint can be read at any number of ranks.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.runs import (
    CHECKPOINT_FILE,
    CheckpointError,
    checkpoint_name,
    checkpoints,
    file_hash,
    one_process,
    read_details,
    verify,
)
from recurrent_depth.training.parallel import Ranks, reshard


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep.

    Args:
        every: steps between checkpoints; the last step is always saved.
        keep_last: newest checkpoints kept.
        keep_every: checkpoints whose step is a multiple of this are kept for good; null keeps none.
    """

    every: int = 1000
    keep_last: int = 2
    keep_every: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep_last < 1 or (self.keep_every is not None and self.keep_every < 1):
            raise ValueError("checkpoint.every, checkpoint.keep_last and checkpoint.keep_every must be at least 1")


def training_state(model: RecurrentDepthModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Flat names to tensors: model.NAME and optimizer.NAME.MOMENT. The tensors are the live ones."""
    reshard(model)  # a validation leaves gathered weights, which are not the optimizer's
    state: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        state[f"model.{name}"] = p.detach()
        for key, value in optimizer.state.get(p, {}).items():
            state[f"optimizer.{name}.{key}"] = value
    return state


def create_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter its (zero) moments, so that a checkpoint has somewhere to be loaded into."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(p.detach()),
                "exp_avg_sq": torch.zeros_like(p.detach()),
            }


def save_checkpoint(
    run: Path, step: int, state: dict[str, Tensor], details: dict[str, Any], ranks: Ranks, config: CheckpointConfig
) -> Path:
    """Write `state` as RUN/checkpoints/step-N. All ranks call this; an error on one is an error on all."""
    final = run / "checkpoints" / checkpoint_name(step)
    temporary = final.with_name(final.name + ".tmp")
    if ranks.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    ranks.barrier()
    _together(ranks, lambda: _write_shards(temporary, state, ranks))
    _together(ranks, lambda: _finish(temporary, final, step, details) if ranks.is_main else None)
    if ranks.is_main:
        _prune(run, config)
    return final


def _write_shards(folder: Path, state: dict[str, Tensor], ranks: Ranks) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with one_process():
        dcp.save(state, storage_writer=writer, no_dist=ranks.world_size == 1)


def _together(ranks: Ranks, action: Any) -> None:
    """Run `action`; if it fails on any rank, fail on every rank."""
    error: Exception | None = None
    try:
        action()
    except (OSError, RuntimeError, dcp.CheckpointException) as caught:
        error = caught if isinstance(caught, Exception) else RuntimeError(str(caught))
    failed = torch.tensor(0.0 if error is None else 1.0, device=ranks.device)
    if ranks.all_reduce(failed).item():
        message = "the checkpoint could not be written; the previous one is untouched. Is the disk full?"
        raise CheckpointError(f"{message} ({error or 'another rank failed'})") from error


def _finish(temporary: Path, final: Path, step: int, details: dict[str, Any]) -> None:
    files = {path.name: file_hash(path) for path in sorted(temporary.iterdir())}
    record = {"step": step, **details, "files": files}
    with (temporary / CHECKPOINT_FILE).open("w") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)


def _prune(run: Path, config: CheckpointConfig) -> None:
    old = checkpoints(run)[: -config.keep_last]
    for path in old:
        step = int(path.name.split("-")[1])
        if config.keep_every is None or step % config.keep_every:
            shutil.rmtree(path)


def load_checkpoint(
    checkpoint: Path, model: RecurrentDepthModel, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> int:
    """Read a checkpoint into model and optimizer, at any world size; returns its step."""
    details = read_details(checkpoint)
    if ranks.is_main:
        verify(checkpoint, details["files"])
    ranks.barrier()
    if details["model"] != asdict(model.config):
        raise CheckpointError(
            f"{checkpoint} holds a model of another shape ({_differences(details['model'], asdict(model.config))}); "
            "resume with the configuration it was trained with"
        )
    create_moments(optimizer)
    state = training_state(model, optimizer)
    reader = HuggingFaceStorageReader(str(checkpoint))
    try:
        with one_process():
            dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
    except (RuntimeError, dcp.CheckpointException) as error:
        raise CheckpointError(f"{checkpoint} does not fit this run (another optimizer?): {error}") from error
    return details["step"]


def _differences(saved: dict[str, Any], current: dict[str, Any]) -> str:
    names = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
    return ", ".join(f"{name}: saved {saved.get(name)}, now {current.get(name)}" for name in sorted(names))
