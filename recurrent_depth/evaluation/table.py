"""Write results as CSV, Markdown, and plots over iterations. Imports matplotlib only for plots."""

import csv
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from recurrent_depth.evaluation.config import Published
from recurrent_depth.files import atomic_file

MAX_LINES = 16
"""Most lines in one panel of a plot; a legend with more is not readable."""

_FRACTIONS = {"acc", "accuracy", "match", "verify", "pass"}


@dataclass(frozen=True)
class Result:
    """One value, a row of results.csv.

    Attributes:
        model: name of the model.
        split: validation (generated rows) or test.
        task: name of the task.
        difficulty: bucket of a generated task, for example 5-8; empty if the task has none.
        mode: how the model was run: lm-eval, parallel, cache-full, cache-1, budget-forcing, or a control.
        budget: thinking budget, for example "tokens=64 waits=1"; empty without a budget.
        seed: seed of the initial state; None for the zero state.
        metric: name of the metric.
        num_steps: core iterations.
        value: value of the metric; accuracies and the like as fractions.
        stderr: standard error; None if it is not known.
        n: number of rows, documents or questions.
    """

    model: str
    split: str
    task: str
    difficulty: str
    mode: str
    budget: str
    seed: int | None
    metric: str
    num_steps: int
    value: float
    stderr: float | None
    n: int


def natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts 5-8 before 13-16, and names without numbers last."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (10**9, part) for part in parts if part]


class Key(NamedTuple):
    """The fields that the results of a line over iterations share. `seed` is empty for the zero state."""

    model: str
    task: str
    difficulty: str
    mode: str
    budget: str
    seed: str
    metric: str


COLUMNS = tuple(field.name for field in fields(Result))


def write_csv(results: Iterable[Result], path: Path) -> None:
    """Write one row per value, with the columns of `Result`; None is an empty cell."""
    with atomic_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)


def read_csv(path: Path) -> list[Result]:
    """Return the rows of a results.csv.

    Raises:
        ValueError: if the file was not written by `recurrent-depth eval`, or has no rows.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"results: {path} cannot be read ({error}); give a results.csv of `eval`") from error
    if not rows:
        raise ValueError(f"results: {path} has no rows; give a results.csv of `recurrent-depth eval`")
    if tuple(rows[0]) != COLUMNS:
        raise ValueError(
            f"results: {path} has the columns {', '.join(map(str, rows[0]))}; a results.csv of `recurrent-depth eval` "
            f"has {', '.join(COLUMNS)}. Run `eval` again, or give another file"
        )
    results = []
    for number, row in enumerate(rows, start=2):
        try:
            results.append(_typed(row))
        except (TypeError, ValueError) as error:
            raise ValueError(f"results: line {number} of {path} is damaged ({error}); run `eval` again") from error
    return results


def _typed(row: dict[str, str]) -> Result:
    values: dict[str, Any] = dict(row)
    values |= {"num_steps": int(row["num_steps"]), "n": int(row["n"]), "value": float(row["value"])}
    values |= {"seed": int(row["seed"]) if row["seed"] else None}
    values |= {"stderr": float(row["stderr"]) if row["stderr"] else None}
    return Result(**values)


def is_fraction(metric: str) -> bool:
    """Return whether a metric is a fraction, shown in percent: accuracies, exact matches, passed programs.

    All others (perplexity, bits_per_byte, bleu, f1, ...) are shown unchanged.
    """
    return bool(_FRACTIONS & set(re.split(r"[^a-z]+", metric.lower())))


def series(results: Iterable[Result]) -> dict[Key, dict[int, Result]]:
    """Group results into lines over iterations: key -> {num_steps: result}."""
    lines: dict[Key, dict[int, Result]] = {}
    for r in results:
        seed = "" if r.seed is None else str(r.seed)
        key = Key(r.model, r.task, r.difficulty, r.mode, r.budget, seed, r.metric)
        lines.setdefault(key, {})[r.num_steps] = r
    return lines


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table that ends with a newline."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def markdown(results: Sequence[Result]) -> str:
    """Return a table with a row per line over iterations and a column per number of iterations.

    Fractions are in percent and marked (%); other metrics are unchanged.
    """
    depths = sorted({result.num_steps for result in results})
    lines = series(results)
    shown = [name for name in Key._fields if name != "model" and any(getattr(key, name) for key in lines)]
    rows = []
    for key, cells in lines.items():
        names = key._replace(metric=metric_label(key.metric))._asdict()
        values = [format_value(cells[r]) if r in cells else "" for r in depths]
        rows.append([*(names[name] for name in shown), *values])
    return markdown_table([*shown, *(f"r={r}" for r in depths)], rows)


def metric_label(metric: str) -> str:
    """Return the metric with its unit, as tables show it."""
    return f"{metric} (%)" if is_fraction(metric) else metric


def format_value(result: Result) -> str:
    """Return the value as tables show it: percent with one decimal, or four significant digits."""
    return f"{100 * result.value:.1f}" if is_fraction(result.metric) else f"{result.value:.4g}"


def beside_published(results: Sequence[Result], published: Sequence[Published]) -> str:
    """Return a table of published values beside the measured ones, with the difference in the unit of the metric."""
    if not published:
        return ""
    head = ["task", "metric", "source", "published", "r", "ours", "mode", "seed", "budget", "difference"]
    rows = []
    for entry in published:
        scale = 100 if is_fraction(entry.metric) else 1
        start = [entry.task, metric_label(entry.metric), entry.source, f"{scale * entry.value:.2f}"]
        ours = [
            r
            for r in results
            if (r.task, r.metric) == (entry.task, entry.metric) and entry.num_steps in (None, r.num_steps)
        ]
        for r in ours:
            value = f"{scale * r.value:.2f}" + ("" if r.stderr is None else f" ± {scale * r.stderr:.2f}")
            seed = "" if r.seed is None else str(r.seed)
            difference = f"{scale * (r.value - entry.value):+.2f}"
            rows.append([*start, str(r.num_steps), value, r.mode, seed, r.budget, difference])
        if not ours:
            rows.append([*start, str(entry.num_steps or ""), "not measured", "", "", "", ""])
    return "\n" + markdown_table(head, rows)


def plot(results: Sequence[Result], path: Path, title: str) -> None:
    """Draw values over iterations with error bars of one standard error: a panel for fractions, one per other metric.

    A panel has at most MAX_LINES lines; its title says if lines are left out.
    """
    panels: dict[str, dict[Key, dict[int, Result]]] = {}
    for key, cells in series(results).items():
        panels.setdefault("%" if is_fraction(key.metric) else key.metric, {})[key] = cells
    figure, all_axes = new_figure(len(panels))
    for axes, (unit, lines) in zip(all_axes, panels.items(), strict=True):
        kept = dict(list(lines.items())[:MAX_LINES])
        for label, cells in zip(line_labels(list(kept)), kept.values(), strict=True):
            draw_line(axes, cells, label=label)
        note = f"\n(first {len(kept)} of {len(lines)} lines; all are in results.csv)" if len(kept) < len(lines) else ""
        axes.set_title(title + note, fontsize="medium", parse_math=False)
        finish_axes(axes, lines, unit)
    save_figure(figure, path)


def line_labels(keys: Sequence[Key]) -> list[str]:
    """Return a label for each line: the parts of its key that differ between lines; for a single line task, metric."""
    differing = [name for name in Key._fields if name != "seed" and len({getattr(key, name) for key in keys}) > 1]
    labels = []
    for key in keys:
        parts = [getattr(key, name) for name in differing or ("task", "metric")]
        labels.append(", ".join(part for part in (*parts, key.seed and f"state seed {key.seed}") if part))
    return labels


def new_figure(panels: int = 1) -> tuple[Any, list[Any]]:
    """Return a figure with panels below each other, narrow enough to read on a phone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(panels, 1, figsize=(5.2, 4 * panels), layout="constrained", squeeze=False)
    return figure, list(axes[:, 0])


def draw_line(axes: Any, cells: dict[int, Result], **style: Any) -> None:
    """Draw one line over iterations with error bars; fractions in percent."""
    depths = sorted(cells)
    scale = 100 if is_fraction(cells[depths[0]].metric) else 1
    errors = [cells[r].stderr for r in depths]
    bars = [0.0 if error is None or math.isnan(error) else scale * error for error in errors]
    axes.errorbar(depths, [scale * cells[r].value for r in depths], bars, marker="o", ms=4, capsize=2, **style)


def finish_axes(axes: Any, lines: dict[Key, dict[int, Result]], unit: str, legend: bool = True) -> None:
    """Label the axes of a panel of `lines`, and add its legend. The x axis is logarithmic."""
    depths = sorted({r for cells in lines.values() for r in cells})
    metrics = sorted({key.metric for key in lines})
    axes.set_xscale("log", base=2)
    axes.set_xticks(depths, [str(r) for r in depths])
    axes.minorticks_off()
    axes.set_xlabel("iterations of the core at test time (r)")
    axes.set_ylabel(f"{', '.join(metrics)}, %" if unit == "%" else unit, parse_math=False)
    axes.grid(alpha=0.3)
    if legend:
        plain_text(axes.legend(fontsize="small"))


def plain_text(legend: Any) -> None:
    """Show the names in a legend literally; matplotlib would read $ as mathematics."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG atomically, and close it."""
    from matplotlib import pyplot as plt

    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
