"""The stages in the order of their value, each in a separate process, and the table at the end."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LOST_DEVICE = 3  # exit status of a stage after an error that makes the GPU unusable for its process
GRACE = 15  # seconds that a measurement which has begun may take beyond the time of its stage


@dataclass(frozen=True)
class StageInfo:
    """A stage: its name, its module, which has `run(stage)`, and the minutes it takes on an H200."""

    name: str
    module: str
    minutes: float


STAGES = (
    StageInfo("machine", "benchmarks.gpu.machine", 0.3),
    StageInfo("kernels", "benchmarks.gpu.kernels", 1.0),
    StageInfo("acceptance", "benchmarks.gpu.acceptance", 4.0),
    StageInfo("training", "benchmarks.gpu.training", 4.0),
    StageInfo("decoding", "benchmarks.gpu.decoding", 5.0),
    StageInfo("roofline", "benchmarks.gpu.roofline", 1.5),
    StageInfo("recipes", "benchmarks.gpu.recipes", 5.0),
    StageInfo("healing", "benchmarks.gpu.healing", 6.0),  # not measured; skipped without build/real
)


def run_suite(out: Path, minutes: float, stages: Sequence[StageInfo] = STAGES) -> list[dict[str, Any]]:
    """Run the stages that are not finished until the time is over; return a row for the table per stage."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    rows = []
    for stage in stages:
        path = out / f"{stage.name}.json"
        left = end - time.monotonic()
        if not _read(path).get("finished") and left > 10:
            _run_stage(stage, path, min(90 * stage.minutes, left - 5))
        rows.append(_row(stage, path))
    return rows


def _run_stage(stage: StageInfo, path: Path, seconds: float) -> None:
    """Run a stage until its time is over; again, without what failed, if its process ended early."""
    print(f"== {stage.name}, at most {seconds:.0f} s", flush=True)
    end, again, goes_on = time.monotonic() + seconds, "", True
    while goes_on and (left := end - time.monotonic()) > 0:
        ending = _run_process([stage.module, str(path), str(left), again], left)
        goes_on = ending == f"status {LOST_DEVICE}" or (ending != "status 0" and _blame(path, ending))
        again = "again"


def _blame(path: Path, ending: str) -> bool:
    """Record the measurement at which a process ended; return whether it was one, and not the start of the stage."""
    content = _read(path)
    running = content.get("running")
    content.setdefault("entries", {})[running or "start"] = {"failure": ending}
    path.write_text(json.dumps(content | {"running": None}, indent=1))
    return running is not None


def _run_process(arguments: list[str], seconds: float) -> str:
    """Run a stage in a process group, which is killed when its time is over, and return how it ended."""
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=_environment(), start_new_session=True)
    try:
        return f"status {process.wait(seconds + GRACE)}"
    except subprocess.TimeoutExpired:
        return f"timeout: still running after {seconds + GRACE:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _environment() -> dict[str, str]:
    """Return the variables of a stage: the packages of this checkout, and no network."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _row(stage: StageInfo, path: Path) -> dict[str, Any]:
    content = _read(path)
    entries = content.get("entries", {})
    failed = [name for name, entry in entries.items() if "failure" in entry]
    state = "finished" if content.get("finished") else "to be continued" if entries else "not started"
    return {"stage": stage.name, "state": state, "entries": len(entries), "failed": failed}


def show(rows: list[dict[str, Any]], out: Path) -> None:
    """Print the table, and the last line of every error."""
    print(f"\n{'stage':<12} {'state':<16} {'entries':>7} {'failed':>6}")
    for row in rows:
        print(f"{row['stage']:<12} {row['state']:<16} {row['entries']:>7} {len(row['failed']):>6}")
    for row in rows:
        entries = _read(out / f"{row['stage']}.json").get("entries", {})
        for name in row["failed"]:
            print(f"FAILED {row['stage']}: {name}: {entries[name]['failure'].strip().splitlines()[-1]}")


def main() -> None:
    """Run the suite from the command line."""
    parser = argparse.ArgumentParser(description=sys.modules["benchmarks.gpu"].__doc__)
    parser.add_argument("--minutes", type=float, default=9, help="time of this call in minutes (default: 9)")
    parser.add_argument("--out", default="gpu-results", help="folder of the JSON files (default: gpu-results)")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stages", nargs="+", choices=names, default=names, help="default: all")
    options = parser.parse_args()
    chosen = [stage for stage in STAGES if stage.name in options.stages]
    import torch

    if torch.cuda.is_available():
        rows = run_suite(Path(options.out).resolve(), options.minutes, chosen)
        show(rows, Path(options.out))
        sys.exit(any(row["failed"] for row in rows))
    with tempfile.TemporaryDirectory() as folder:
        rows = run_suite(Path(folder), options.minutes, chosen)
        show(rows, Path(folder))
    print("no GPU: every stage ran at toy size on the CPU; nothing was measured, and nothing is kept")
    sys.exit(any(row["failed"] or row["state"] != "finished" for row in rows))
