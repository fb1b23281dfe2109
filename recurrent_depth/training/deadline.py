"""When a run must stop by itself, early enough to save."""

import os
import time


class Deadline:
    """`max_hours` after now, or `margin_minutes` before the Slurm job ends (SLURM_JOB_END_TIME), whichever is first."""

    def __init__(self, max_hours: float | None, margin_minutes: float) -> None:
        ends = []
        if max_hours is not None:
            ends.append(time.time() + max_hours * 3600)
        if os.environ.get("SLURM_JOB_END_TIME", "").isdigit():
            ends.append(float(os.environ["SLURM_JOB_END_TIME"]) - margin_minutes * 60)
        self.end = min(ends, default=None)

    def passed(self) -> bool:
        return self.end is not None and time.time() > self.end
