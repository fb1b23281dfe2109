"""A trace of a few training steps by torch.profiler, on the main rank."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from recurrent_depth.files import atomic_file

WAIT, WARMUP, ACTIVE = 4, 1, 3
"""Training steps that are not recorded (compilation, first allocations), that warm the profiler up, and recorded."""


@contextmanager
def profiled(run: Path, step: int, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Record training steps; yield a function to call after each training step of this command.

    The trace is RUN/profile/steps-A-B.json, for chrome://tracing or ui.perfetto.dev.

    Args:
        step: training steps done before.
        say: prints a line.
    """
    first = step + WAIT + WARMUP + 1
    path = run / "profile" / f"steps-{first}-{first + ACTIVE - 1}.json"
    written = False

    def write(profiler: profile) -> None:
        nonlocal written
        if profiler.step_num < WAIT + WARMUP + ACTIVE:  # the run has ended while training steps were recorded
            return
        path.parent.mkdir(exist_ok=True)
        with atomic_file(path) as temporary:
            profiler.export_chrome_trace(str(temporary))
        written = True
        say(f"trace of the training steps {first} to {first + ACTIVE - 1}: {path}")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    steps = schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=write) as profiler:
        yield profiler.step
    if not written:
        needed = WAIT + WARMUP + ACTIVE
        say(f"no trace was written: profile needs {needed} training steps after the start of the command")
