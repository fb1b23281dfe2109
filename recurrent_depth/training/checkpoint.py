"""The state of a run as flat tensors, and reading it back at any number of ranks (writing: saving.py)."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.runs import CheckpointError, one_process, read_details, verify
from recurrent_depth.training.parallel import Ranks, reshard


def training_state(model: RecurrentDepthModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Flat names to tensors: model.NAME and optimizer.NAME.MOMENT. The tensors are the live ones."""
    reshard(model)  # a validation leaves gathered weights, which are not the optimizer's
    state: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        state[f"model.{name}"] = p.detach()
        for key, value in optimizer.state.get(p, {}).items():
            state[f"optimizer.{name}.{key}"] = value
    return state


@torch.no_grad()
def create_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter its moments, so that a checkpoint has somewhere to be loaded into: one step of rate 0."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def load_checkpoint(
    checkpoint: Path, model: RecurrentDepthModel, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> dict[str, Any]:
    """Read a checkpoint into model and optimizer, at any world size; returns its checkpoint.json."""
    details = read_details(checkpoint)
    if ranks.is_main:
        verify(checkpoint, details["files"])
    ranks.barrier()
    if details["model"] != asdict(model.config):
        raise CheckpointError(
            f"{checkpoint} holds a model of another shape ({_differences(details['model'], asdict(model.config))}); "
            "resume with the configuration it was trained with"
        )
    reshard(model)
    create_moments(optimizer)
    state = training_state(model, optimizer)
    reader = HuggingFaceStorageReader(str(checkpoint))
    try:
        with one_process():
            dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
    except (RuntimeError, dcp.CheckpointException) as error:
        raise CheckpointError(
            f"{checkpoint} does not fit this run (another optimizer, or weights without moments?): {error}"
        ) from error
    return details


def _differences(saved: dict[str, Any], current: dict[str, Any]) -> str:
    names = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
    return ", ".join(f"{name}: saved {saved.get(name)}, now {current.get(name)}" for name in sorted(names))
