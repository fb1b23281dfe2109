"""Loss spikes: go back to a checkpoint and leave out the data that led there (PaLM, arXiv 2204.02311, section 5.1).

Data, depths and noise of a step are functions of a number, its draw. Without rewinds the draw is the step. A rewind
from step s to checkpoint c moves the draws of all later steps on by s - c: the rows between are not seen again.
"""

import json
import statistics
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

from recurrent_depth.runs import checkpoints
from recurrent_depth.training.config import SpikeConfig
from recurrent_depth.training.health import TrainingAborted

REWINDS_FILE = "rewinds.json"


@dataclass(frozen=True)
class Rewind:
    """One rewind: from `step` on, draws are `skipped` further on. `spike` is the step whose loss was `loss`."""

    step: int
    skipped: int
    spike: int
    loss: float
    median: float


class SpikeGuard:
    """Watches the losses of a run. All ranks see the same numbers, so they decide alike."""

    def __init__(self, config: SpikeConfig, run: Path) -> None:
        self.config, self.run = config, run
        self.losses: deque[float] = deque(maxlen=config.window)
        self.rewinds: list[Rewind] = []

    def restore(self, losses: list[float]) -> None:
        """Go on from a checkpoint: its last losses, and the run's rewinds."""
        self.losses = deque(losses, maxlen=self.config.window)
        path = self.run / REWINDS_FILE
        if path.is_file():
            self.rewinds = [Rewind(**entry) for entry in json.loads(path.read_text())]

    def draw(self, step: int) -> int:
        """The number that names data, depths and noise of a step."""
        return step + sum(rewind.skipped for rewind in self.rewinds if rewind.step <= step)

    def is_spike(self, loss: float) -> bool:
        """Whether `loss` is one; if not, it joins the losses that the next one is compared with."""
        full = len(self.losses) == self.config.window
        if self.config.factor is not None and full and loss > self.config.factor * statistics.median(self.losses):
            return True
        self.losses.append(loss)
        return False

    def target(self, spike: int) -> Path:
        """The checkpoint to go back to."""
        if len(self.rewinds) >= self.config.max_rewinds:
            raise TrainingAborted(
                f"step {spike}: the loss spikes again after {len(self.rewinds)} rewinds (spikes.max_rewinds); "
                "lower optimizer.lr, or look for broken data"
            )
        found = [path for path in checkpoints(self.run) if _step(path) <= spike - self.config.margin]
        if not found:
            raise TrainingAborted(
                f"step {spike}: the loss spikes and no checkpoint is {self.config.margin} steps older; "
                "lower checkpoint.every, or raise checkpoint.keep_last"
            )
        return found[-1]

    def record(self, spike: int, loss: float, checkpoint: Path, *, write: bool) -> Rewind:
        """Note a rewind; the rank that writes makes it last before training goes on."""
        step = _step(checkpoint)
        rewind = Rewind(step, spike + 1 - step, spike, loss, statistics.median(self.losses))
        self.rewinds.append(rewind)
        if write:
            temporary = self.run / f"{REWINDS_FILE}.tmp"
            temporary.write_text(json.dumps([asdict(entry) for entry in self.rewinds], indent=1))
            temporary.replace(self.run / REWINDS_FILE)
        return rewind


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])
