"""Experiment trackers that show the numbers of metrics.jsonl: TensorBoard, Weights & Biases, trackio.

Each is a thin adapter of its library, imported only when it is used. Servers, projects and modes are set by the
environment variables of the library (WANDB_PROJECT, WANDB_MODE, TRACKIO_SPACE_ID, ...).
"""

import os
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from recurrent_depth.errors import UserError
from recurrent_depth.extras import require
from recurrent_depth.files import write_text
from recurrent_depth.training.config import TrackerName

PROJECT = "recurrent-depth"
WANDB_ID_FILE = "wandb-id.txt"


class Tracker(Protocol):
    """A place to which the numbers of a run go."""

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Add the numbers of a training step."""

    def close(self) -> None:
        """Write what is buffered and end the connection."""


def choose_trackers(names: tuple[TrackerName, ...] | None) -> tuple[TrackerName, ...]:
    """Return the trackers of a run; None means tensorboard if it is installed.

    Raises:
        MissingPackageError: if the package of a tracker is not installed.
    """
    if names is None:
        return ("tensorboard",) if find_spec("tensorboard") else ()
    for name in names:
        require(name, "recurrent-depth[trackers]", f"trackers: {name}")
    return names


def open_tracker(name: TrackerName, run: Path, config: dict[str, Any]) -> Tracker:
    """Return a tracker that continues the records of the folder `run`.

    Args:
        config: the options of the run as plain values, to be shown with it.
    """
    if name == "tensorboard":
        return TensorBoard(run)
    return WandB(run, config) if name == "wandb" else Trackio(run, config)


class TensorBoard:
    """Write event files to RUN/tensorboard."""

    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"))

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Send the numbers to Weights & Biases. RUN/wandb-id.txt holds the id, so that a resumed run continues its own."""

    def __init__(self, run: Path, config: dict[str, Any]) -> None:
        import wandb

        path = run / WANDB_ID_FILE
        if not path.exists():
            write_text(path, uuid.uuid4().hex)
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT), name=run.name, dir=str(run), config=config,
                id=path.read_text().strip(), resume="allow",
            )  # fmt: skip
        except wandb.errors.Error as error:
            raise UserError(
                f"trackers: wandb could not start ({error}); run `wandb login`, set WANDB_MODE=offline, or leave wandb "
                "out of trackers"
            ) from error
        # A separate axis: wandb's step counter refuses the lower steps after a rewind or resume.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log({"step": step, **numbers})

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """Write the numbers to the database of trackio (TRACKIO_DIR), or to a Space or server."""

    def __init__(self, run: Path, config: dict[str, Any]) -> None:
        import trackio

        self.run = trackio.init(project=PROJECT, name=run.name, config=config, resume="allow", embed=False)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()
