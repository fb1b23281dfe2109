"""Export checkpoints while a run continues."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from recurrent_depth.runs import step_of
from recurrent_depth.training.config import RunConfig


class Exporter:
    """Run `recurrent-depth export` on checkpoints of a run, in a process without GPU.

    A separate process keeps transformers out of the trainer, and a failed export does not end the run.

    Args:
        say: prints a line; the second argument says whether it is a warning.
    """

    def __init__(self, config: RunConfig, say: Callable[[str, bool], None]) -> None:
        self.config, self.say = config, say
        self.process: subprocess.Popen[str] | None = None
        self.cancelled = False

    def is_due(self, step: int) -> bool:
        """Return whether the checkpoint of a training step is to be exported."""
        export, between = self.config.export, self.config.checkpoint.every
        regular = export.every is not None and step % (between * export.every) == 0
        return regular or (export.at_end and step == self.config.steps)

    def export(self, checkpoint: Path) -> None:
        """Export a checkpoint if it is due, and wait until that has ended."""
        if self.cancelled or not self.is_due(step_of(checkpoint)):
            return
        try:
            self._export(checkpoint)
        except OSError as error:
            self.say(f"{checkpoint} was not exported ({error})", True)

    def _export(self, checkpoint: Path) -> None:
        out = Path(self.config.out) / "exports" / checkpoint.name
        command = ["export", "--model", str(checkpoint), "--out", str(out), "--dtype", self.config.export.dtype]
        if out.exists():  # of before a rewind, or of an earlier attempt at this training step
            shutil.rmtree(out)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "recurrent_depth.cli", *command], text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        if self.cancelled:  # in the meantime
            self.process.terminate()
        _, messages = self.process.communicate()
        if self.process.returncode == 0:
            self.say(f"exported {checkpoint.name} to {out}", False)
        else:
            reason = (messages.strip().splitlines() or ["no message"])[-1]
            self.say(f"{checkpoint} was not exported ({reason}); try: recurrent-depth {' '.join(command)}", True)

    def cancel(self) -> None:
        """End the current export, and start no other: the run has to stop soon."""
        self.cancelled = True
        if self.process is not None:
            self.process.terminate()
