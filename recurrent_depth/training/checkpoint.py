"""The state of a run as tensors, what a resume may change, and reading a checkpoint at any number of ranks.

Writing is in saving.py.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recurrent_depth.data.tasks.source import curriculum
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.runs import (
    CHECKPOINT_FILE,
    MODEL,
    OPTIMIZER,
    CheckpointError,
    check_fields,
    read_details,
    read_part,
    verify,
)
from recurrent_depth.training.config import RunConfig
from recurrent_depth.training.faults import flat
from recurrent_depth.training.parallel import reshard
from recurrent_depth.training.schedule import learning_rate

MAY_CHANGE = frozenset(
    {
        "out", "log_every", "max_hours", "slurm_margin_minutes", "runtime", "checkpoint", "validation", "health",
        "init_from", "spikes.max_rewinds",
        "steps",  # check_steps decides
        # The fingerprint of the data decides.
        "data.packed.path", "data.packed.validation_path", "data.packed.revision",
    }
)  # fmt: skip
"""Options and sections that a resume may change. Every other one, a new one included, decides the numbers of a run."""


def trajectory(config: RunConfig) -> dict[str, Any]:
    """Return the options that decide the numbers of a run, as section.field; a resume must not change them."""
    values = flat(json.loads(json.dumps(asdict(config))))
    return {name: value for name, value in values.items() if not MAY_CHANGE & {name, name.partition(".")[0]}}


def read_resume_details(checkpoint: Path) -> dict[str, Any]:
    """Return checkpoint.json with the fields that a resume needs."""
    details = read_details(checkpoint)
    kinds = {"steps": int, "trajectory": dict, "data": str, "last_losses": list, "health": dict}
    check_fields(checkpoint / CHECKPOINT_FILE, details, kinds)
    return details


def check_resume(
    config: RunConfig, fingerprint: str, checkpoint: Path, details: dict[str, Any], accept_changed_data: bool
) -> None:
    """Raise unless a run of `config` continues from `checkpoint` as if it had never stopped."""
    saved, current = details["trajectory"], trajectory(config)
    changed = [name for name in sorted({**saved, **current}) if saved.get(name) != current.get(name)]
    if accept_changed_data:
        changed = [name for name in changed if not name.startswith("data.")]
    if changed:
        described = "; ".join(f"{name}: was {saved.get(name)}, is {current.get(name)}" for name in changed)
        raise CheckpointError(
            f"this configuration is not the one of {checkpoint} ({described}); restore it to resume, or start a new "
            f"run from its weights: --init-from {config.out} --out NEW"
        )
    if details["data"] != fingerprint and not accept_changed_data:
        raise CheckpointError(
            f"the data are not those {checkpoint} was trained on (fingerprints differ); restore them, "
            "or pass --accept-changed-data true"
        )
    check_steps(config, details["step"], details["steps"])


def check_steps(config: RunConfig, done: int, planned: int) -> None:
    """Raise unless the `done` training steps of a run of `planned` steps are those of a run of config.steps."""
    if config.steps == planned:
        return
    if config.steps < done:
        raise CheckpointError(f"steps is {config.steps}, but {config.out} has already trained {done}; raise --steps")
    for step in range(done):
        reasons = []
        if learning_rate(config.optimizer, step, planned) != learning_rate(config.optimizer, step, config.steps):
            reasons.append(f"the learning rate (optimizer.schedule {config.optimizer.schedule})")
        if _length(config, step, planned) != _length(config, step, config.steps):
            reasons.append("the length of the rows (curriculum_fraction)")
        if reasons:
            older = f"continue from a checkpoint up to step {step} (move newer ones out of {config.out}/checkpoints); "
            raise CheckpointError(
                f"steps was {planned}, is {config.steps}, but {' and '.join(reasons)} of the {done} steps already "
                f"trained depends on it from step {step} on. Restore steps; or {older if step else ''}"
                f"start a new run from these weights: --init-from {config.out} --out NEW"
            )


def _length(config: RunConfig, step: int, total_steps: int) -> int | None:
    rows = config.data.task or config.data.puzzles
    return None if rows is None else curriculum(rows, step, total_steps, "train")


def training_state(model: RecurrentDepthModel, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Return the parts of a checkpoint: weights by NAME, moments by NAME.MOMENT. The tensors are the live ones."""
    reshard(model)  # a validation leaves gathered weights, which are not the optimizer's
    weights, moments = {}, {}
    for name, p in model.named_parameters():
        weights[name] = p.detach()
        for key, value in optimizer.state.get(p, {}).items():
            moments[f"{name}.{key}"] = value
    return {MODEL: weights, OPTIMIZER: moments}


@torch.no_grad()
def create_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter its moments, so that a checkpoint can be read into them: one step with learning rate 0."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def verify_all(checkpoint: Path, details: dict[str, Any]) -> None:
    """Compare every file with its checksum; an average, which has no moments, is an error."""
    if "average" in details:
        raise CheckpointError(
            f"{checkpoint} holds averaged weights without moments and cannot be resumed; start a new run from it with "
            "--init-from"
        )
    verify(checkpoint, details["files"])


def load_state(
    checkpoint: Path, details: dict[str, Any], model: RecurrentDepthModel, optimizer: torch.optim.Optimizer
) -> None:
    """Read a verified checkpoint into model and optimizer, at any number of ranks."""
    saved, current = details["model"], asdict(model.config)
    changed = [name for name in sorted({**saved, **current}) if saved.get(name) != current.get(name)]
    if changed:
        described = ", ".join(f"{name}: saved {saved.get(name)}, now {current.get(name)}" for name in changed)
        raise CheckpointError(
            f"{checkpoint} holds a model of another shape ({described}); resume with the configuration it was trained "
            "with"
        )
    # Without moments, every step so far was skipped, and the optimizer is as it was at the start.
    optimizer.state.clear()
    if any(name.startswith(f"{OPTIMIZER}/") for name in details["files"]):
        create_moments(optimizer)
    for part, tensors in training_state(model, optimizer).items():
        if tensors:
            read_part(checkpoint, part, tensors, alone=not dist.is_initialized())
