"""`recurrent-depth quickstart`: train a small recurrent model and two baselines, evaluate and analyse them.

Runs the commands that a user would type, each in a process with one CPU thread, one process per core at a time. Imports
no torch.
"""

import csv
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from recurrent_depth.checks import check_at_least
from recurrent_depth.files import check_new_folder

RECURRENT, BASELINES, TEXT = "shell-game", ("fixed-10", "depth-1"), "text"
NUM_STEPS = "1,2,4,8,12,16,32,64"
ROWS = 256
GAMES = (
    "cup3 swap01 swap24 swap23 swap23 swap01 swap01 swap04 swap13 swap02 swap03 swap04 swap03 swap23 swap12 swap01",
    "cup3 swap03 swap34 swap01 swap03 swap02 swap13 swap34 swap02 swap34 swap23 swap03 swap03 swap01 swap02 swap04",
    "cup4 swap04 swap02 swap34 swap34 swap12 swap01 swap03 swap01 swap14 swap13 swap13 swap23 swap34 swap24 swap12",
)
"""Held-out games that the page shows: a cup, then swaps."""
NOTE = (
    "shell-game iterates one core block. depth-1 has the same shape, trained and evaluated at one iteration; fixed-10 "
    "has ten different layers. parallel: all positions in one pass, which decoding with a full cache equals; "
    "cache-full and cache-1: token by token, with a cache of every iteration or of one shared iteration. text is a "
    "model of Python source code, trained by the same commands."
)


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Train a small recurrent model and two baselines on the CPU, evaluate them, and write a report and a page.

    Args:
        out: new folder for the runs, the evaluations, report.html and the page analysis/index.html.
        configs: folder with shell-game.yaml, fixed-10.yaml, depth-1.yaml and text.yaml; the default is shipped with the
            package.
        jobs: commands that run at the same time, each on one CPU thread; null: one per CPU core.
    """

    out: str = "runs/quickstart"
    configs: str = "pretrain/quickstart"
    jobs: int | None = None

    def __post_init__(self) -> None:
        check_at_least("jobs", self.jobs, 1)


def quickstart(config: QuickstartConfig) -> Path:
    """Run the quickstart, print a summary, and return the path of the report.

    Raises:
        FileExistsError: if `out` exists and is not empty.
        ChildProcessError: if a command fails; the others are terminated.
    """
    out = Path(config.out)
    check_new_folder(out)
    start = time.monotonic()
    work = pipelines(out, config.configs)
    jobs = min(config.jobs or _count_cores(), len(work))
    print(f"quickstart: {', '.join(work)}; {jobs} at the same time, one thread each", flush=True)
    with ThreadPoolExecutor(jobs) as pool, Commands() as commands:
        for future in as_completed([pool.submit(commands.run_all, name, steps) for name, steps in work.items()]):
            future.result()
        report = out / "report.html"
        commands.run("report", report_command(out, report))
        commands.run("analyze", analyze_command(out))
    print("\n" + summary(out))
    page = (out / "analysis" / "index.html").resolve()
    print(
        f"\nreport: {report.resolve()}\nwatch it think: {page}\ntotal time: {time.monotonic() - start:.0f} s",
        flush=True,
    )
    return report


def pipelines(out: Path, configs: str) -> dict[str, list[list[str]]]:
    """Return the commands for each model in order. The longest come first, so that the cores finish together."""
    work = {}
    for name in (RECURRENT, *BASELINES):
        run = str(out / name)
        modes, num_steps = ("parallel,cache-full,cache-1", NUM_STEPS) if name == RECURRENT else ("parallel", "1")
        evaluation = ["--generated.tasks", "shell_game", "--generated.modes", modes, "--generated.rows", str(ROWS)]
        work[name] = [
            ["train", "--config", f"{configs}/{name}.yaml", "--out", run],
            ["eval", "--model", run, "--out", str(out / f"eval-{name}"), "--num-steps", num_steps, *evaluation],
        ]
    data = str(out / "text-data")
    work[TEXT] = [
        ["prepare", "--source", "python-stdlib", "--sequence-length", "128", "--out", data],
        ["train", "--config", f"{configs}/{TEXT}.yaml", "--data.packed.path", data, "--out", str(out / TEXT)],
    ]
    return work


def report_command(out: Path, report: Path) -> list[str]:
    """Return the command that writes the report."""
    runs = ",".join(str(out / name) for name in (RECURRENT, *BASELINES, TEXT))
    return [
        "report", "--out", str(report), "--runs", runs, "--results", _results(out), "--title", "Quickstart",
        "--note", NOTE,
    ]  # fmt: skip


def analyze_command(out: Path) -> list[str]:
    """Return the command that writes the page of the recurrent model."""
    games = [word for game in GAMES for word in ("--text", game)]
    return [
        "analyze", "--model", str(out / RECURRENT), "--out", str(out / "analysis"), *games, "--num-steps", "32",
        "--converged-steps", "64", "--results", _results(out), "--title", "Shell game",
    ]  # fmt: skip


def _results(out: Path) -> str:
    return ",".join(str(out / f"eval-{name}" / "results.csv") for name in (RECURRENT, *BASELINES))


class Commands:
    """Run commands of this package as processes. Processes that still run when the block ends are terminated."""

    def __init__(self) -> None:
        self.running: list[subprocess.Popen[str]] = []
        self.stopped = False
        self.lock = threading.Lock()

    def __enter__(self) -> "Commands":
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.terminate()

    def run_all(self, name: str, commands: list[list[str]]) -> None:
        """Run commands one after the other."""
        for arguments in commands:
            self.run(name, arguments)

    def run(self, name: str, arguments: list[str]) -> None:
        """Run one command; print its progress and messages with the prefix `name`."""
        command = [sys.executable, "-m", "recurrent_depth.cli", *arguments]
        with self.lock:
            if self.stopped:
                return
            print(f"{name:<10} $ recurrent-depth {' '.join(arguments)}", flush=True)
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            self.running.append(process)
        assert process.stderr is not None
        for line in process.stderr:
            print(f"{name:<10} {line.rstrip()}", flush=True)
        status = process.wait()
        if status and not self.stopped:
            raise ChildProcessError(
                f"{name}: `recurrent-depth {arguments[0]}` ended with status {status}; see its messages above"
            )


def summary(out: Path) -> str:
    """Return a table for the terminal with the accuracy and the training cost of the three models."""
    depths = [int(depth) for depth in NUM_STEPS.split(",")]
    lines = [
        f"Shell game: accuracy in percent over {ROWS} held-out games, all positions, one parallel pass",
        "iterations".ljust(12) + "".join(f"{depth:>7}" for depth in depths) + "   training",
    ]
    for name in (RECURRENT, *BASELINES):
        accuracy = read_accuracy(out / f"eval-{name}" / "results.csv")
        cells = (f"{100 * accuracy[depth]:.1f}" if depth in accuracy else "" for depth in depths)
        flops, seconds = read_cost(out / name)
        lines.append(f"{name:<12}" + "".join(f"{cell:>7}" for cell in cells) + f"   {flops:.2e} FLOPs, {seconds:.0f} s")
    return "\n".join(lines)


def read_accuracy(results: Path) -> dict[int, float]:
    """Return the accuracy over all positions in mode parallel, by number of iterations."""
    with results.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["difficulty"], row["mode"]) == ("all", "parallel")]
    return {int(row["num_steps"]): float(row["value"]) for row in rows}


def read_cost(run: Path) -> tuple[float, float]:
    """Return the FLOPs and the seconds of the training steps of a run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["type"] == "train"]
    return sum(record["flops"] for record in train), sum(record["seconds"] for record in train)


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
