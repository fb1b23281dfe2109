"""The view of a run on a terminal: a progress bar, and below it what a user watches, updated in place."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

MOST_WARNINGS = 3


class LiveView:
    """Shows the newest numbers of training and validation, and the last warnings.

    Args:
        console: a terminal.
        step, total: training steps done and in all.
    """

    def __init__(self, console: Console, step: int, total: int) -> None:
        self.bar = Progress(TextColumn("training step"), MofNCompleteColumn(), BarColumn(bar_width=40))
        self.task = self.bar.add_task("training", total=total, completed=step)
        self.train: Mapping[str, Any] = {}
        self.validation: Mapping[str, Any] = {}
        self.validated_at = 0
        self.warnings: list[str] = []
        self.live = Live(console=console, get_renderable=self.render, refresh_per_second=2)
        self.live.start()

    def add(self, step: int, record: Mapping[str, Any]) -> None:
        """Take a record of the run: `train` or `validation`; others are ignored."""
        if record.get("type") == "train":
            self.train = record
            self.bar.update(self.task, completed=step)
        elif record.get("type") == "validation":
            self.validation, self.validated_at = record, step
            self.warnings = [*self.warnings, *record.get("warnings", [])][-MOST_WARNINGS:]

    def render(self) -> Group:
        """Return the view."""
        parts: list[Any] = [self.bar]
        if self.train:
            parts.append(_table(training_cells(self.train)))
        losses = losses_by_iterations(self.validation)
        if losses:
            cells = {f"r={r}": f"{loss:.4f}" for r, loss in losses.items()}
            parts += [f"validation loss at step {self.validated_at}, by iterations", _table(cells)]
        parts += [Text(text, style="bold yellow") for text in self.warnings]
        return Group(*parts)

    def stop(self) -> None:
        """Draw the last numbers and leave them on the terminal."""
        self.live.stop()


def training_cells(record: Mapping[str, Any]) -> dict[str, str]:
    """Return what is shown of a training record, by heading."""
    cells = {
        "loss": f"{record['loss']:.4f}",
        "gradient": f"{record['gradient_norm']:.2f}",
        "lr": f"{record['lr']:.2e}",
        "depth": f"{record['num_steps']:.0f}",
        "tokens/s": f"{record['tokens_per_second']:,.0f}",
    }
    if "mfu" in record:
        cells["MFU"] = f"{record['mfu']:.1%}"
    cells["peak memory"] = f"{record['peak_memory_bytes'] / 1e9:.2f} GB"
    cells["ETA"] = str(timedelta(seconds=round(record["eta_seconds"])))
    return cells


def losses_by_iterations(record: Mapping[str, Any]) -> dict[int, float]:
    """Return the losses of a validation record by number of iterations."""
    return {int(name[5:]): value for name, value in record.items() if name.startswith("loss_") and name[5:].isdigit()}


def _table(cells: Mapping[str, str]) -> Table:
    table = Table(*cells, box=None, pad_edge=False)
    table.add_row(*cells.values())
    return table
