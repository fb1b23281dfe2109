"""Writing checkpoints beside training: whole or not at all, and never in silence.

A save copies the state to the CPU and returns; a thread writes the files, hashes them, adds checkpoint.json last and
renames the folder. Its collectives run in a process group of their own, so that they never mix with training's.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from recurrent_depth.runs import CHECKPOINT_FILE, CheckpointError, checkpoint_name, checkpoints, file_hash, one_process
from recurrent_depth.training.config import CheckpointConfig
from recurrent_depth.training.parallel import Ranks


class CheckpointWriter:
    """Saves a run's checkpoints one after the other. All ranks call every method at the same point of the run."""

    def __init__(self, run: Path, config: CheckpointConfig, ranks: Ranks) -> None:
        self.run, self.config, self.ranks = run, config, ranks
        self.group = dist.new_group(backend="gloo") if ranks.world_size > 1 else None
        self.error: Exception | None = None
        self._thread: threading.Thread | None = None

    def save(self, step: int, state: dict[str, Tensor], details: dict[str, Any]) -> None:
        """Write `state` as RUN/checkpoints/step-N; waits for the save before, and raises its error."""
        self.wait()
        copy = BlockingAsyncStager().stage(state) if self.config.background else state
        self._thread = threading.Thread(target=self._write, args=(step, copy, details), name=f"save-{step}")
        self._thread.start()
        if not self.config.background:
            self.wait()

    def wait(self) -> None:
        """Until the current save is on disk; an error in it is raised here, on every rank."""
        self.finish()
        if self.error is not None:
            raise self.error

    def finish(self) -> None:
        """Until the current save has ended, well or not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, state: dict[str, Tensor], details: dict[str, Any]) -> None:
        final = self.run / "checkpoints" / checkpoint_name(step)
        temporary = final.with_name(final.name + ".tmp")
        try:
            self._together(lambda: self._on_main(lambda: _empty_folder(temporary)))
            self._together(lambda: _write_shards(temporary, state, self.group))
            hashes = self._hashes(temporary)
            self._together(lambda: self._on_main(lambda: self._publish(temporary, final, step, details, hashes)))
        except Exception as error:
            self.error = error
            self._on_main(lambda: shutil.rmtree(temporary, ignore_errors=True))

    def _publish(self, temporary: Path, final: Path, step: int, details: dict[str, Any], files: dict[str, str]) -> None:
        _finish(temporary, final, {"step": step, **details, "files": files})
        _prune(self.run, self.config)

    def _on_main(self, action: Callable[[], None]) -> None:
        if self.ranks.is_main:
            action()

    def _hashes(self, folder: Path) -> dict[str, str]:
        """SHA-256 of every file, the files divided among the ranks."""
        names = sorted(path.name for path in folder.iterdir())
        mine: dict[str, str] = {}
        self._together(
            lambda: mine.update(
                {name: file_hash(folder / name) for name in names[self.ranks.rank :: self.ranks.world_size]}
            )
        )
        if self.group is None:
            return mine
        everyone: list[dict[str, str]] = [{} for _ in range(self.ranks.world_size)]
        dist.all_gather_object(everyone, mine, group=self.group)
        return {name: value for part in everyone for name, value in sorted(part.items())}

    def _together(self, action: Callable[[], None]) -> None:
        """Run `action`; if it fails on any rank, fail on every rank."""
        error: Exception | None = None
        try:
            action()
        except (OSError, RuntimeError, dcp.CheckpointException) as caught:
            error = caught if isinstance(caught, Exception) else RuntimeError(str(caught))
        failed = torch.tensor(0.0 if error is None else 1.0)
        if self.group is not None:
            dist.all_reduce(failed, group=self.group)
        if failed.item():
            raise CheckpointError(
                "the checkpoint could not be written; the previous one is untouched. Is the disk full? Make room, "
                f"then continue with --resume true ({error or 'another rank failed'})"
            ) from error


def _empty_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_shards(folder: Path, state: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with one_process():
        dcp.save(state, storage_writer=writer, process_group=group, no_dist=group is None)


def _finish(temporary: Path, final: Path, record: dict[str, Any]) -> None:
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
