"""Loss spikes: go back to a checkpoint and skip the data that led to the spike (PaLM, arXiv 2204.02311, section 5.1).

Data, depths and noise of a training step are functions of one number, its data step. Without rewinds that is the step
itself. A rewind from step s to checkpoint c adds s - c to the data steps of all later steps, which skips the rows in
between.
"""

import json
import statistics
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

from recurrent_depth.files import write_json
from recurrent_depth.runs import CheckpointError, checkpoints, remove_checkpoint, step_of
from recurrent_depth.training.config import SpikeConfig
from recurrent_depth.training.health import TrainingAborted

REWINDS_FILE = "rewinds.json"


@dataclass(frozen=True)
class Rewind:
    """A rewind to the checkpoint of `step`; later data steps are shifted by `skipped`. `spike`: the step of `loss`."""

    step: int
    skipped: int
    spike: int
    loss: float
    median: float


def read_rewinds(run: Path) -> list[Rewind]:
    """Return the rewinds of a run, oldest first."""
    path = run / REWINDS_FILE
    if not path.is_file():
        return []
    try:
        return [Rewind(**entry) for entry in json.loads(path.read_text())]
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore it, or start a new run") from error


class SpikeGuard:
    """Detect loss spikes and prepare rewinds. All ranks see the same losses, so they decide the same."""

    def __init__(self, config: SpikeConfig, run: Path) -> None:
        self.config, self.run = config, run
        self.losses: deque[float] = deque(maxlen=config.window)
        self.rewinds: list[Rewind] = []

    def restore(self, losses: list[float]) -> None:
        """Continue with the last losses, as a checkpoint holds them."""
        self.losses = deque(losses, maxlen=self.config.window)

    def data_step(self, step: int) -> int:
        """Return the number that data, depths and noise of a training step are functions of.

        After a later rewind to an older checkpoint, what an earlier one skipped is skipped from there on.
        """
        first = [min(later.step for later in self.rewinds[n:]) for n in range(len(self.rewinds))]
        return step + sum(rewind.skipped for rewind, at in zip(self.rewinds, first, strict=True) if at <= step)

    def is_spike(self, loss: float) -> bool:
        """Return whether `loss` is a spike; if not, add it to the losses of the median."""
        full = len(self.losses) == self.config.window
        if self.config.factor is not None and full and loss > self.config.factor * statistics.median(self.losses):
            return True
        self.losses.append(loss)
        return False

    def prepare_rewind(self, spike: int, loss: float) -> tuple[Path, Rewind]:
        """Choose the checkpoint to go back to, remove newer ones, and record the rewind. Call it on one rank.

        A run that is killed at any point of this resumes from that checkpoint, and has either recorded the rewind or
        sees the same spike again.
        """
        if len(self.rewinds) >= self.config.max_rewinds:
            raise TrainingAborted(
                f"step {spike}: the loss spikes again after {len(self.rewinds)} rewinds (spikes.max_rewinds); "
                "lower optimizer.lr, or check the data"
            )
        complete = checkpoints(self.run)
        found = [path for path in complete if step_of(path) <= spike - self.config.margin]
        if not found:
            raise TrainingAborted(
                f"step {spike}: the loss spikes and no checkpoint is {self.config.margin} steps older (spikes.margin); "
                "lower checkpoint.every, or raise checkpoint.keep_last"
            )
        for newer in reversed(complete[len(found) :]):
            remove_checkpoint(newer)
        step = step_of(found[-1])
        rewind = Rewind(step, spike + 1 - step, spike, loss, statistics.median(self.losses))
        write_json(self.run / REWINDS_FILE, [asdict(entry) for entry in [*self.rewinds, rewind]])
        return found[-1], rewind
