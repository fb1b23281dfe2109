"""The range of iterations in which a model was measured to work, stored with the model.

`recurrent-depth study --loss.store true` writes it; commands that iterate the model warn beyond it.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recurrent_depth.files import write_json
from recurrent_depth.runs import find_checkpoint, is_run
from recurrent_depth.terminal import print_line

FILE = "depth-range.json"


@dataclass(frozen=True)
class DepthRange:
    """Iterations whose loss is within a tolerance of the best.

    Attributes:
        low, high: first and last of them.
        best: iterations with the smallest loss.
        tolerance: in nats.
        losses: every measured loss by iterations.
    """

    low: int
    high: int
    best: int
    tolerance: float
    losses: Mapping[int, float]

    def record(self) -> dict[str, Any]:
        """Return the content of the file."""
        return asdict(self) | {"losses": {str(r): loss for r, loss in self.losses.items()}}


def _file(model: str | Path) -> Path:
    return (find_checkpoint(model) if is_run(model) else Path(model)) / FILE


def store(model: str | Path, found: DepthRange) -> Path:
    """Write the range into the model's folder (of a run: its newest checkpoint) and return the file.

    Raises:
        ValueError: if the model is not a folder.
    """
    if not Path(model).is_dir():
        raise ValueError(f"loss.store: {model} is not a folder on this machine; leave store out")
    write_json(_file(model), found.record())
    return _file(model)


def copy_to(folder: Path, model: str | Path) -> None:
    """Copy the stored range of a model into a folder that is written from it. Without a stored range do nothing."""
    if Path(model).is_dir() and _file(model).is_file():
        shutil.copyfile(_file(model), folder / FILE)


def warn_beyond(model: str | Path, *num_steps: int) -> None:
    """Print a warning if iterations lie outside the stored range. Without a stored range nothing is printed."""
    file = _file(model) if Path(model).is_dir() else None
    if file is None or not file.is_file():
        return
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        low, high = int(record["low"]), int(record["high"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); remove it, or store the range again") from error
    outside = sorted(r for r in set(num_steps) if not low <= r <= high)
    if outside:
        print_line(
            f"warning: num_steps {', '.join(map(str, outside))} is outside of the range {low} to {high} in which this "
            f"model was measured to work ({file.name})"
        )
