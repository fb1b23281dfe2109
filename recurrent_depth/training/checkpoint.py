"""Write and read the checkpoints of a run, and check what a resume may change.

A checkpoint is complete or absent, and a failed save ends the run on every rank. A save copies the state to the CPU and
returns; a thread writes the files, hashes them, adds checkpoint.json last and renames the folder. Its collectives run
in a separate process group, so that they never mix with those of training. A checkpoint can be read at any number of
ranks. The layout of the folder is in recurrent_depth/runs.py.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from recurrent_depth.data.tasks.source import curriculum
from recurrent_depth.files import file_hash, write_json
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.runs import (
    CHECKPOINT_FILE,
    MODEL,
    OPTIMIZER,
    CheckpointError,
    check_fields,
    checkpoint_name,
    checkpoints,
    one_process,
    read_details,
    read_part,
    remove_checkpoint,
    step_of,
    verify,
)
from recurrent_depth.training.config import CheckpointConfig, RunConfig
from recurrent_depth.training.faults import flattened
from recurrent_depth.training.optimizer import learning_rate
from recurrent_depth.training.parallel import Ranks, reshard

MAY_CHANGE = frozenset(
    {
        "out", "log_every", "trackers", "profile", "max_hours", "slurm_margin_minutes", "runtime", "checkpoint",
        "export", "validation", "health", "init_from", "spikes.max_rewinds",
        "steps",  # checked by check_steps
        # Checked by the fingerprint of the data.
        "data.packed.path", "data.packed.validation_path", "data.packed.revision",
    }
)  # fmt: skip
"""Options and sections that a resume may change. All others, also new ones, are taken to affect the result."""


def trajectory(config: RunConfig) -> dict[str, Any]:
    """Return the options that affect the result of a run, as section.field; a resume must not change them."""
    values = flattened(json.loads(json.dumps(asdict(config))))
    return {name: value for name, value in values.items() if not MAY_CHANGE & {name, name.partition(".")[0]}}


def read_resume_details(checkpoint: Path) -> dict[str, Any]:
    """Return the content of checkpoint.json, after checking the fields that a resume needs."""
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
            f"this configuration differs from that of {checkpoint} ({described}); restore it to resume, or start a new "
            f"run from its weights: --init-from {config.out} --out NEW"
        )
    if details["data"] != fingerprint and not accept_changed_data:
        raise CheckpointError(
            f"{checkpoint} was trained on different data (the fingerprints differ); restore the data, "
            "or pass --accept-changed-data true"
        )
    check_steps(config, details["step"], details["steps"])


def check_steps(config: RunConfig, done: int, planned: int) -> None:
    """Raise if changing the length of a run from `planned` to config.steps would change its `done` training steps."""
    if config.steps == planned:
        return
    if config.steps < done:
        raise CheckpointError(f"steps is {config.steps}, but {config.out} has already trained {done}; raise --steps")
    advice = extension_refusal(config, done, planned)
    if advice is not None:
        raise CheckpointError(f"steps was {planned}, is {config.steps}, but {advice[0]}. Restore steps; or {advice[1]}")


def extension_refusal(config: RunConfig, done: int, planned: int) -> tuple[str, str] | None:
    """Return why a run of `planned` training steps cannot become one of config.steps, and what to do; None if it can.

    Args:
        done: training steps done.
    """
    for step in range(done):
        reasons = []
        if learning_rate(config.optimizer, step, planned) != learning_rate(config.optimizer, step, config.steps):
            reasons.append(f"the learning rate (optimizer.schedule {config.optimizer.schedule})")
        if _length(config, step, planned) != _length(config, step, config.steps):
            reasons.append("the length of the rows (curriculum_fraction)")
        if reasons:
            older = (
                f"continue from a checkpoint up to step {step} (move newer ones out of {config.out}/checkpoints); or "
            )
            new = f"start a new run from these weights: --init-from {config.out} --out NEW"
            return (
                f"{' and '.join(reasons)} of the {done} training steps done depends on it from step {step} on",
                f"{older if step else ''}{new}",
            )
    return None


def _length(config: RunConfig, step: int, total_steps: int) -> int | None:
    rows = config.data.task or config.data.puzzles
    return None if rows is None else curriculum(rows, step, total_steps, "train")


def training_state(model: RecurrentDepthModel, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Return the parts of a checkpoint: weights by NAME, moments by NAME.MOMENT. The tensors are not copied."""
    reshard(model)  # after a validation the parameters are gathered, but the moments belong to the sharded ones
    weights, moments = {}, {}
    for name, p in model.named_parameters():
        weights[name] = p.detach()
        for key, value in optimizer.state.get(p, {}).items():
            moments[f"{name}.{key}"] = value
    return {MODEL: weights, OPTIMIZER: moments}


@torch.no_grad()
def create_moments(optimizer: torch.optim.Optimizer) -> None:
    """Create the moments of every parameter, to read a checkpoint into: one training step with learning rate 0."""
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
    """Compare every file with its checksum.

    Raises:
        CheckpointError: if a file is missing or damaged, or the checkpoint is an average, which has no moments.
    """
    if "average" in details:
        raise CheckpointError(
            f"{checkpoint} holds averaged weights without moments, so it cannot be resumed; start a new run from it "
            "with --init-from"
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
    # A checkpoint without moments: every training step so far was skipped, so the optimizer has no state yet.
    optimizer.state.clear()
    if any(name.startswith(f"{OPTIMIZER}/") for name in details["files"]):
        create_moments(optimizer)
    for part, tensors in training_state(model, optimizer).items():
        if tensors:
            read_part(checkpoint, part, tensors, alone=not dist.is_initialized())


State = dict[str, dict[str, Tensor]]
"""part of the checkpoint -> name -> tensor"""


class CheckpointWriter:
    """Write the checkpoints of a run, one at a time. All ranks must call each method at the same point of the run.

    Args:
        after_save: called with each new checkpoint on the main rank; it is a part of the save, so `wait` waits for it.
    """

    def __init__(
        self, run: Path, config: CheckpointConfig, ranks: Ranks, after_save: Callable[[Path], None] = lambda path: None
    ) -> None:
        self.run, self.config, self.ranks, self.after_save = run, config, ranks, after_save
        self.group = dist.new_group(backend="gloo") if ranks.world_size > 1 else None
        self.error: Exception | None = None
        self._thread: threading.Thread | None = None

    def save(self, step: int, state: State, details: dict[str, Any]) -> None:
        """Start to write `state` as RUN/checkpoints/step-N, after waiting for the previous save (see `wait`)."""
        self.wait()
        copy = BlockingAsyncStager().stage(state) if self.config.background else state
        self._thread = threading.Thread(target=self._write, args=(step, copy, details), name=f"save-{step}")
        self._thread.start()
        if not self.config.background:
            self.wait()

    def wait(self) -> None:
        """Wait until the current save is on disk. An error of that save is raised here, on every rank."""
        self.finish()
        if self.error is not None:
            raise self.error

    def finish(self) -> None:
        """Wait until the current save has ended, with or without an error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, state: State, details: dict[str, Any]) -> None:
        final = self.run / "checkpoints" / checkpoint_name(step)
        temporary = final.with_name(final.name + ".tmp")
        try:
            self._together(final, lambda: self._on_main(lambda: _make_folders(temporary, list(state))))
            for part, tensors in state.items():
                self._together(final, partial(self._write_part, temporary / part, tensors))
            files = self._hashes(final, temporary)
            record = {"step": step, **details, "files": files}
            self._together(final, lambda: self._on_main(lambda: self._publish(temporary, final, record)))
            self._on_main(lambda: self.after_save(final))
        except Exception as error:
            self.error = error
            self._on_main(lambda: shutil.rmtree(temporary, ignore_errors=True))

    def _write_part(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        with one_process():
            dcp.save(tensors, storage_writer=writer, process_group=self.group, no_dist=self.group is None)

    def _hashes(self, final: Path, folder: Path) -> dict[str, str]:
        """Return the SHA-256 of every file, by its name in the checkpoint. Each rank hashes a part of the files."""
        listed: list[str] = []
        mine: dict[str, str] = {}
        self._together(final, lambda: self._on_main(lambda: listed.extend(_files(folder))))
        names = self.ranks.gather(listed, self.group)[0][self.ranks.rank :: self.ranks.world_size]
        self._together(final, lambda: mine.update({name: file_hash(folder / name) for name in names}))
        everyone = self.ranks.gather(mine, self.group)
        return dict(sorted((name, value) for part in everyone for name, value in part.items()))

    def _publish(self, temporary: Path, final: Path, record: dict[str, Any]) -> None:
        write_json(temporary / CHECKPOINT_FILE, record)
        if final.exists():
            remove_checkpoint(final)
        os.replace(temporary, final)
        _prune(self.run, self.config)

    def _on_main(self, action: Callable[[], None]) -> None:
        if self.ranks.is_main:
            action()

    def _together(self, final: Path, action: Callable[[], None]) -> None:
        """Run `action` on every rank; if it fails on one, raise an error with its cause on all."""
        failure: BaseException | None = None
        try:
            action()
        except (Exception, dcp.CheckpointException) as error:  # CheckpointException is a BaseException
            failure = error
        causes = self.ranks.gather(None if failure is None else _cause(failure), self.group)
        cause = next((cause for cause in causes if cause is not None), None)
        if cause is not None:
            raise CheckpointError(
                f"{final} could not be written ({cause}); no other checkpoint has changed. If the disk is full, free "
                "some space and run the command again (train: with --resume true)"
            ) from failure


def _cause(error: BaseException) -> str:
    if isinstance(error, dcp.CheckpointException):  # its text is the traceback of every rank
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}"


def _make_folders(folder: Path, parts: list[str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for part in parts:
        (folder / part).mkdir(parents=True)


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _prune(run: Path, config: CheckpointConfig) -> None:
    """Remove the checkpoints that need not be kept, and unfinished ones of killed processes."""
    complete = checkpoints(run)
    for path in complete[: -config.keep_last]:
        if config.keep_every is None or step_of(path) % config.keep_every:
            remove_checkpoint(path)
    for path in (run / "checkpoints").glob("step-*"):
        if path.is_dir() and not (path / CHECKPOINT_FILE).is_file():
            shutil.rmtree(path)
