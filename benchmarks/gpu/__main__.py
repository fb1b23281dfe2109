"""Run one stage: `python -m benchmarks.gpu MODULE FILE SECONDS AGAIN`, the processes that the suite starts."""

import importlib
import sys
from pathlib import Path

from benchmarks.gpu.stage import Stage, TimeOver


def main(module: str, path: str, seconds: str, again: str) -> None:
    """Run the measurements of a stage until its time is over."""
    stage = Stage(Path(path), float(seconds), keep_failed=bool(again))
    try:
        importlib.import_module(module).run(stage)
    except TimeOver:
        print("the time of this stage is over", flush=True)
    else:
        stage.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
