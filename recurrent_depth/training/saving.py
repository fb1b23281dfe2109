"""Write checkpoints beside training. A checkpoint is complete or absent, and a failed save ends the run on every rank.

A save copies the state to the CPU and returns; a thread writes the files, hashes them, adds checkpoint.json last and
renames the folder. Its collectives run in a separate process group, so that they never mix with training's.
"""

import os
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from recurrent_depth.files import file_hash, write_json
from recurrent_depth.runs import (
    CHECKPOINT_FILE,
    CheckpointError,
    checkpoint_name,
    checkpoints,
    one_process,
    remove_checkpoint,
    step_of,
)
from recurrent_depth.training.config import CheckpointConfig
from recurrent_depth.training.parallel import Ranks

State = dict[str, dict[str, Tensor]]
"""Tensors by part of the checkpoint and name."""


class CheckpointWriter:
    """Saves a run's checkpoints one after the other. All ranks call every method at the same point of the run."""

    def __init__(self, run: Path, config: CheckpointConfig, ranks: Ranks) -> None:
        self.run, self.config, self.ranks = run, config, ranks
        self.group = dist.new_group(backend="gloo") if ranks.world_size > 1 else None
        self.error: Exception | None = None
        self._thread: threading.Thread | None = None

    def save(self, step: int, state: State, details: dict[str, Any]) -> None:
        """Write `state` as RUN/checkpoints/step-N; wait for the save before, and raise its error."""
        self.wait()
        copy = BlockingAsyncStager().stage(state) if self.config.background else state
        self._thread = threading.Thread(target=self._write, args=(step, copy, details), name=f"save-{step}")
        self._thread.start()
        if not self.config.background:
            self.wait()

    def wait(self) -> None:
        """Wait until the current save is on disk; an error in it is raised here, on every rank."""
        self.finish()
        if self.error is not None:
            raise self.error

    def finish(self) -> None:
        """Wait until the current save has ended, well or not."""
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
        except Exception as error:
            self.error = error
            self._on_main(lambda: shutil.rmtree(temporary, ignore_errors=True))

    def _write_part(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        with one_process():
            dcp.save(tensors, storage_writer=writer, process_group=self.group, no_dist=self.group is None)

    def _hashes(self, final: Path, folder: Path) -> dict[str, str]:
        """Return the SHA-256 of every file by its name in the checkpoint. The files are divided among the ranks."""
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
        """Run `action`; if it fails on any rank, fail on every rank and name the cause."""
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
    """Remove checkpoints that are not to be kept, and what killed processes have left of others."""
    complete = checkpoints(run)
    for path in complete[: -config.keep_last]:
        if config.keep_every is None or step_of(path) % config.keep_every:
            remove_checkpoint(path)
    for path in (run / "checkpoints").glob("step-*"):
        if path.is_dir() and not (path / CHECKPOINT_FILE).is_file():
            shutil.rmtree(path)
