"""Run logging (metrics.jsonl, trackers, progress on the terminal), and the time limit of a run."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from recurrent_depth.files import explain_full_disk, write_text
from recurrent_depth.training.live import LiveView
from recurrent_depth.training.trackers import Tracker


class RunLog:
    """Write the records of a run. Only the main rank has one."""

    def __init__(self, run: Path, start_step: int, total_steps: int, trackers: list[Tracker]) -> None:
        self.path = run / "metrics.jsonl"
        _drop_records_from(self.path, start_step)
        self.file = _open(self.path)
        self.trackers = trackers
        self.console = Console(stderr=True)
        self.live = LiveView(self.console, start_step, total_steps) if self.console.is_terminal else None
        self.last_line = 0.0

    def write(self, step: int, record: dict[str, Any]) -> None:
        """Append one record to metrics.jsonl, and send its numbers to the trackers."""
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        with explain_full_disk(self.path):
            self.file.write(json.dumps({"step": step, **record}) + "\n")
        self._track(lambda tracker: tracker.log(step, numbers))
        if self.live is not None:
            self.live.add(step, record)

    def rewind(self, step: int, record: dict[str, Any]) -> None:
        """Remove the records after `step`, which will be written again, and append `record`."""
        self.file.close()
        _drop_records_from(self.path, step)
        self.file = _open(self.path)
        self.write(step, record)

    def show(self, step: int, total: int, text: str) -> None:
        """Without a terminal, print a line every few seconds; on a terminal the live view shows the records."""
        if self.live is not None:
            return
        if time.monotonic() - self.last_line > 5 or step == total:
            self.last_line = time.monotonic()
            print(f"step {step}/{total} {text}", file=sys.stderr, flush=True)

    def say(self, text: str, warning: bool = False) -> None:
        """Print a line, on a terminal above the live view."""
        style = "bold yellow" if warning else None
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Stop the live view and close the files."""
        if self.live is not None:
            self.live.stop()
        with explain_full_disk(self.path):
            self.file.close()
        self._track(lambda tracker: tracker.close())

    def _track(self, action: Callable[[Tracker], None]) -> None:
        """Call every tracker. One that fails is dropped: a lost server must not end the run."""
        for tracker in list(self.trackers):
            try:
                action(tracker)
            except Exception as error:
                self.trackers.remove(tracker)
                self.say(f"warning: {type(tracker).__name__} failed and is not used any more: {error}", warning=True)


def _open(path: Path) -> TextIO:
    """Open metrics.jsonl to append, line buffered: a killed process must not lose records."""
    with explain_full_disk(path):
        return path.open("a", buffering=1)


def _drop_records_from(path: Path, step: int) -> None:
    """Remove the records after `step`, which will be written again, and a half-written last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    write_text(path, "".join(kept))


class Deadline:
    """The earlier of `max_hours` from now and `margin_minutes` before the Slurm job ends (SLURM_JOB_END_TIME)."""

    def __init__(self, max_hours: float | None, margin_minutes: float) -> None:
        ends = []
        if max_hours is not None:
            ends.append(time.time() + max_hours * 3600)
        if os.environ.get("SLURM_JOB_END_TIME", "").isdigit():
            ends.append(float(os.environ["SLURM_JOB_END_TIME"]) - margin_minutes * 60)
        self.end = min(ends, default=None)

    def passed(self) -> bool:
        return self.end is not None and time.time() > self.end
