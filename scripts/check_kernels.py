"""Compile every kernel ahead of time for every GPU it is meant for, as it would be launched at the 3.5B shape.

    python scripts/check_kernels.py            # prints the table; writes benchmarks/results/kernels_aot.md
    python scripts/check_kernels.py --planted  # checks a matrix tile that is too large, and must exit with 1

Exits with 1 and names the kernels if one would not launch (shared memory, threads), spills registers, or multiplies
matrices without matrix instructions. Needs no GPU; must run without TRITON_INTERPRET.
"""

import argparse
import os
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import triton

import planted_tile
from recurrent_depth_kernels import catalogue
from recurrent_depth_kernels.compilation import Compiled, compile_launch
from recurrent_depth_kernels.launch import INTERPRETED, Launch
from recurrent_depth_kernels.targets import ARCHITECTURES

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "kernels_aot.md"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HEADER = """# Kernels, compiled ahead of time

Written by `make kernels-check` (scripts/check_kernels.py) with triton {version}: every launch at the shape of the 3.5B
model (width 5280, 55 heads of 96, inner width 17,920). Nothing here was run: no time is measured. A cell holds the
block, warps (w), registers a thread (r), KiB of shared memory a program (K), the widest load in bits (b), the family of
matrix instructions, and bytes spilled, if any. Backward passes are compiled in bf16 alone, in which that model trains.
"""


@dataclass(frozen=True)
class Task:
    """One launch of the catalogue on one architecture, as it is sent to worker processes."""

    arch: str
    dtype: str
    label: str
    planted: bool = False


@lru_cache
def launches(arch: str, dtype: str, planted: bool = False) -> dict[str, Launch]:
    """Return the launches by label, without those that compile to the same program."""
    if planted:
        found = [planted_tile.matrix_product()]
    else:
        found = catalogue.launches(arch, dtype=DTYPES[dtype]) + catalogue.decode_launches(arch, DTYPES[dtype])
    return {_label(launch): launch for launch in found if dtype == "bf16" or "backward" not in launch.name}


def _label(launch: Launch) -> str:
    """Return the kernel, its constants, and the arguments that are 1 (which are compiled as constants)."""
    ones = [name for name, type_ in launch.signature().items() if type_ == "constexpr" and name in launch.arguments]
    return launch.label + (f" with {', '.join(ones)} = 1" if ones else "")


def run(task: Task) -> Compiled | str:
    """Compile one launch; return the result, or the error as text."""
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    try:
        return compile_launch(_launch(task), task.arch)
    except Exception as fault:  # a kernel that does not compile is a result of the check
        return f"does not compile: {type(fault).__name__}: {fault}"


def _launch(task: Task) -> Launch:
    return launches(task.arch, task.dtype, task.planted)[task.label]


def tasks(architectures: Sequence[str], planted: bool = False) -> list[Task]:
    return [
        Task(arch, dtype, label, planted)
        for arch in architectures
        for dtype in (["bf16"] if planted else DTYPES)
        for label in launches(arch, dtype, planted)
    ]


def table(results: dict[Task, Compiled | str]) -> str:
    """Return a Markdown table with a row per kernel and a column per GPU."""
    architectures = sorted({task.arch for task in results}, key=ARCHITECTURES.index)
    rows: dict[str, dict[str, str]] = defaultdict(dict)
    for task, result in results.items():
        rows[_row(task)][task.arch] = _cell(_launch(task), result)
    lines = ["| kernel | " + " | ".join(architectures) + " |", "|---" * (len(architectures) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(found.get(arch, "") for arch in architectures) + " |"
        for name, found in sorted(rows.items())
    ]
    return "\n".join(lines) + "\n"


def _row(task: Task) -> str:
    """Return kernel, dtype and variant. Block sizes differ between GPUs and are in the cells."""
    launch = _launch(task)
    hidden = ("BLOCK", "K", "ACCUMULATE")
    shown = {k.lower(): v for k, v in launch.constants.items() if v is not False and not k.startswith(hidden)}
    variant = [k if v is True else f"{k} {v}" for k, v in shown.items()]
    variant += [task.label.partition(" with ")[2]] if " with " in task.label else []
    return f"{launch.name} {task.dtype}" + (f": {', '.join(variant)}" if variant else "")


def _cell(launch: Launch, result: Compiled | str) -> str:
    if isinstance(result, str):
        return "**fault**"
    block = launch.constants.get("BLOCK", launch.constants.get("BLOCK_S", launch.constants.get("BLOCK_K")))
    text = f"{block} {launch.num_warps}w {result.registers}r {result.shared / 1024:.3g}K {result.load_bits}b"
    text += "".join(f" {name}" for name in result.matrix_instructions)
    return text + (f" **{result.spilled} spilled**" if result.spilled else "")


def check(chosen: list[Task], workers: int = 2) -> dict[Task, Compiled | str]:
    """Compile all tasks in separate processes, without triton's cache."""
    with tempfile.TemporaryDirectory() as cache, ProcessPoolExecutor(workers) as pool:
        os.environ["TRITON_CACHE_DIR"] = cache  # read by the worker processes, which start with the first task
        return dict(zip(chosen, pool.map(run, chosen), strict=True))


def faults(results: dict[Task, Compiled | str]) -> list[str]:
    found = []
    for task, result in results.items():
        for fault in [result] if isinstance(result, str) else result.faults():
            found.append(f"{task.label} {task.dtype} on {task.arch}: {fault}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--planted", action="store_true", help="check an oversized tile instead of the kernels")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if INTERPRETED:
        raise SystemExit("TRITON_INTERPRET is set, but nothing is compiled in the interpreter; unset it")
    results = check(tasks(args.arch, args.planted))
    text = HEADER.format(version=triton.__version__) + "\n" + table(results)
    print(text)
    found = faults(results)
    if found:
        print(f"{len(found)} faults:", *found, sep="\n  ", file=sys.stderr)
        return 1
    if args.planted:
        return 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)
    print(f"{len(results)} kernels compile; wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
