"""Messages of a command to its user, and the progress of long work."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_SECONDS = 10.0
"""Seconds between lines of progress where there is no terminal."""


def print_line(text: str) -> None:
    """Print a line to stderr; stdout is for results."""
    Console(stderr=True, highlight=False).print(text, soft_wrap=True, markup=False)


@contextmanager
def progress(name: str, total: int) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each of `total` parts of some work.

    On a terminal it moves a bar with the remaining time; elsewhere it prints a line every LINE_SECONDS.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(name, total=total)
            yield lambda: bar.advance(task)
        return
    done, last = 0, time.monotonic()

    def advance() -> None:
        nonlocal done, last
        done += 1
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            print_line(f"{name}: {done} of {total}")

    yield advance


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Name what is done now: with a moving sign on a terminal, in a line elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        print_line(name)
        yield
        return
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
    ) as bar:
        bar.add_task(name, total=None)
        yield
