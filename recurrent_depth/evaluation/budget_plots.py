"""Pictures of a grid over hidden steps and visible tokens: a heat map, and the iso-FLOP frontier."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recurrent_depth.evaluation.scaling import Cell, frontier


def plot_heat_map(cells: Sequence[Cell], path: Path, title: str) -> None:
    """Accuracy in percent by number of steps (rows) and budget of tokens (columns)."""
    figure, axes = _figure()
    labels = list(dict.fromkeys(cell.label for cell in cells))
    depths = sorted({cell.num_steps for cell in cells})
    table = {(cell.num_steps, cell.label): 100 * cell.accuracy for cell in cells}
    values = [[table.get((r, label), float("nan")) for label in labels] for r in depths]
    axes.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if value == value:
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color="w" if value < 60 else "k")
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    axes.set_yticks(range(len(depths)), [str(r) for r in depths])
    axes.set(xlabel="thinking", ylabel="steps of the core", title=title)
    _save(figure, path)


def plot_frontier(cells: Sequence[Cell], path: Path, title: str) -> None:
    """Accuracy over FLOPs of a question: every cell, and the line of those that nothing cheaper beats."""
    figure, axes = _figure()
    for label in dict.fromkeys(cell.label for cell in cells):
        line = sorted((cell for cell in cells if cell.label == label), key=lambda cell: cell.flops)
        errors = [196 * cell.stderr for cell in line]
        points = [cell.flops for cell in line], [100 * cell.accuracy for cell in line]
        axes.errorbar(*points, errors, fmt="o", ms=4, capsize=2, label=label)
    best = frontier(cells)
    axes.step([cell.flops for cell in best], [100 * cell.accuracy for cell in best], "k-", where="post", lw=1)
    for cell in best:
        axes.annotate(f"r={cell.num_steps}", (cell.flops, 100 * cell.accuracy), (3, -9), textcoords="offset points")
    axes.set_xscale("log")
    axes.set(xlabel="FLOPs of a question", ylabel="accuracy, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", title="thinking; line: frontier")
    _save(figure, path)


def _figure() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(figsize=(7, 4.2), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=120)
    plt.close(figure)
