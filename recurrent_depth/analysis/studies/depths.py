"""Accuracy over test-time iterations across models trained at different mean depths."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from recurrent_depth.analysis.figures import save
from recurrent_depth.analysis.studies.config import DepthsStudy
from recurrent_depth.evaluation.table import (
    Result,
    draw_line,
    finish_axes,
    format_value,
    is_fraction,
    markdown_table,
    new_figure,
    read_csv,
    series,
)
from recurrent_depth.files import write_text
from recurrent_depth.terminal import print_line


class Curve(NamedTuple):
    """The results of a model by number of iterations, and the mean depth it was trained at."""

    trained: int
    cells: dict[int, Result]


def study_depths(study: DepthsStudy, folder: Path) -> None:
    """Write depths.csv, depths.md and the figure; print the warnings."""
    curves = [_curve(Path(path), trained, study) for path, trained in zip(study.results, study.trained, strict=True)]
    found = warnings(curves)
    for text in found:
        print_line(f"warning: {text}")
    steps = sorted({r for curve in curves for r in curve.cells})
    rows = [
        [f"trained at {curve.trained}", *(format_value(curve.cells[r]) if r in curve.cells else "" for r in steps)]
        for curve in curves
    ]
    table = markdown_table(["model", *(f"r={r}" for r in steps)], rows)
    write_text(folder / "depths.md", table + "".join(f"\nWarning: {text}\n" for text in found))
    print(table)
    figure, (axes,) = new_figure()
    for curve in curves:
        draw_line(axes, curve.cells, label=f"trained at {curve.trained}")
        if curve.trained in curve.cells:
            own = curve.cells[curve.trained]
            axes.plot(curve.trained, (100 if is_fraction(own.metric) else 1) * own.value, "k*", ms=11, zorder=3)
    lines = series(result for curve in curves for result in curve.cells.values())
    finish_axes(axes, lines, "%" if is_fraction(next(iter(lines)).metric) else next(iter(lines)).metric)
    axes.set_title("star: at the depth of training", fontsize="medium")
    numbers = ([curve.trained, r, result.value, result.stderr] for curve in curves for r, result in curve.cells.items())
    save(figure, folder, "depths", ["trained", "num_steps", "value", "stderr"], numbers)


def _curve(path: Path, trained: int, study: DepthsStudy) -> Curve:
    lines = {
        key: cells
        for key, cells in series(read_csv(path)).items()
        if key.mode == study.mode and key.difficulty in ("", "all") and study.task in ("", key.task)
    }
    if len(lines) != 1:
        names = ", ".join(sorted({key.task for key in lines})) or "none"
        raise ValueError(
            f"depths.results: {path} has {len(lines)} curves in mode {study.mode} (tasks: {names}); choose one with "
            "--depths.task and --depths.mode"
        )
    return Curve(trained, next(iter(lines.values())))


def warnings(curves: Sequence[Curve]) -> list[str]:
    """Return a sentence for each curve that alone would mislead about what test-time iterations buy.

    A curve is low at few iterations partly because its model was trained for more. If a model trained at fewer
    iterations does better there, by more than two standard errors, the rise of the curve is not the gain of depth.
    """
    found = []
    for curve in curves:
        for other in curves:
            r = other.trained
            if r >= curve.trained or r not in curve.cells or r not in other.cells:
                continue
            here, there = curve.cells[r], other.cells[r]
            error = ((here.stderr or 0) ** 2 + (there.stderr or 0) ** 2) ** 0.5
            if there.value - here.value > 2 * error:
                found.append(
                    f"at r={r} the model trained at {r} has {format_value(there)}, the one trained at {curve.trained} "
                    f"only {format_value(here)}: the curve of the latter alone overstates what more iterations buy"
                )
    return found
