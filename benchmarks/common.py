"""What every benchmark shares: where it ran, and how its result is written."""

import json
import math
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recurrent_depth.extras import package_version
from recurrent_depth.files import write_json
from recurrent_depth.runs import find_checkpoint, step_of
from recurrent_depth.training.config import RunConfig
from recurrent_depth.training.launch import train

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Hardware and versions behind a result."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpu": device,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "transformers": package_version("transformers"),
        "recurrent_depth": package_version("recurrent-depth"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def interval(values: list[float]) -> list[float]:
    """95% interval of the mean over seeds by Student's t; [nan, nan] of a single value."""
    n = len(values)
    if n < 2:
        return [math.nan, math.nan]
    half = _T95[min(n - 1, len(_T95)) - 1] * statistics.stdev(values) / math.sqrt(n)
    mean = statistics.mean(values)
    return [mean - half, mean + half]


_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Two-sided 95% quantiles of Student's t for 1, 2, ... degrees of freedom."""


def kept(folder: str | None, name: str, compute: Callable[[], Any]) -> Any:
    """The JSON FOLDER/NAME.json, or what `compute` returns, which is then kept there: a long benchmark in parts."""
    if folder is None:
        return compute()
    path = Path(folder) / f"{name}.json"
    if not path.is_file():
        value = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, value, indent=None)
    return json.loads(path.read_text())


def trained_run(config: RunConfig) -> Path:
    """Start or continue a run and return its folder. A signal ends a run early; that stops the benchmark."""
    run = train(config, resume=True)
    if (step := step_of(find_checkpoint(run))) < config.steps:
        raise SystemExit(f"{run} was stopped at training step {step} of {config.steps}; run the same command again")
    return run


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def read_result(name: str) -> Any:
    """Return the content of benchmarks/results/NAME.json."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def write_result(name: str, payload: dict[str, Any]) -> Path:
    """benchmarks/results/NAME.json, with the environment."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_json(path, {"environment": environment(), **payload})
    print(f"wrote {path}")
    return path
