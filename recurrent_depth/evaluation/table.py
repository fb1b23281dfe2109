"""Long tables of results: CSV, Markdown and a plot."""

import csv
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """One value. `value` and `stderr` are fractions; `difficulty` is empty where a task has none."""

    model: str
    split: str
    task: str
    difficulty: str
    mode: str
    metric: str
    num_steps: int
    value: float
    stderr: float
    n: int


@dataclass(frozen=True)
class Published:
    """A value that somebody reported, to print beside ours.

    Args:
        value: a fraction.
        num_steps: steps it was measured at; null, for a model that has none, stands beside ours at any number.
        source: of the value, where a file has several.
    """

    task: str
    metric: str
    value: float
    num_steps: int | None = None
    source: str = ""


def write_csv(results: Iterable[Result], path: Path) -> None:
    """One row a value, columns in the order of `Result`."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)])
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)
    os.replace(temporary, path)


def beside_published(results: list[Result], published: list[Published]) -> str:
    """A second table: each published value, ours in every mode, and the difference in points."""
    if not published:
        return ""
    head = ["task", "metric", "source", "published", "r", "ours", "mode", "difference"]
    lines = ["", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for entry in published:
        ours = [
            r
            for r in results
            if (r.task, r.metric) == (entry.task, entry.metric) and entry.num_steps in (None, r.num_steps)
        ]
        start = f"| {entry.task} | {entry.metric} | {entry.source} | {100 * entry.value:.2f} |"
        lines += [
            f"{start} {r.num_steps} | {100 * r.value:.2f} ± {100 * r.stderr:.2f} | {r.mode} | "
            f"{100 * (r.value - entry.value):+.2f} |"
            for r in ours
        ] or [f"{start} {entry.num_steps or ''} | not measured | | |"]
    return "\n".join(lines) + "\n"


def markdown(results: list[Result]) -> str:
    """A row per (task, difficulty, mode, metric), a column per number of steps, values in percent."""
    depths = sorted({result.num_steps for result in results})
    lines = ["| task | difficulty | mode | metric | " + " | ".join(f"r={r}" for r in depths) + " |"]
    lines.append("|" + "---|" * (4 + len(depths)))
    for key, cells in _series(results).items():
        values = [f"{cells[r].value * 100:.1f}" if r in cells else "" for r in depths]
        lines.append("| " + " | ".join([*key, *values]) + " |")
    return "\n".join(lines) + "\n"


def plot(results: list[Result], path: Path, title: str) -> None:
    """Value against steps with error bars (one standard error), one line per task, difficulty and mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for key, cells in _series(results).items():
        depths = sorted(cells)
        values = [100 * cells[r].value for r in depths]
        errors = [100 * cells[r].stderr for r in depths]
        axes.errorbar(depths, values, errors, marker="o", capsize=3, label=" ".join(part for part in key[:3] if part))
    axes.set_xscale("log", base=2)
    depths = sorted({result.num_steps for result in results})
    axes.set_xticks(depths, [str(r) for r in depths])
    axes.minorticks_off()
    metrics = sorted({result.metric for result in results})
    axes.set(xlabel="steps of the core at test time", ylabel=f"{', '.join(metrics)}, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _series(results: list[Result]) -> dict[tuple[str, str, str, str], dict[int, Result]]:
    series: dict[tuple[str, str, str, str], dict[int, Result]] = {}
    for result in results:
        key = (result.task, result.difficulty, result.mode, result.metric)
        series.setdefault(key, {})[result.num_steps] = result
    return series
