"""The grid over core iterations and thinking budgets: tables (grid.csv, grid.md) and plots."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from recurrent_depth.evaluation.budget_metrics import Cell, axis_reports, frontier
from recurrent_depth.evaluation.budgets import Examiner, budget_label
from recurrent_depth.evaluation.config import BudgetsConfig
from recurrent_depth.evaluation.controls import run_controls
from recurrent_depth.evaluation.table import Result, markdown_table, new_figure, save_figure
from recurrent_depth.files import atomic_file, write_text

FORCED = "budget-forcing"


def evaluate_budgets(examiner: Examiner, config: BudgetsConfig, num_steps: Sequence[int]) -> Iterator[Cell]:
    """Yield a cell for every budget and number of iterations, then those of the controls."""
    for thinking_tokens, waits in config.combinations():
        for r in num_steps:
            attempts = examiner.ask(r, thinking_tokens, waits)
            yield attempts.cell(FORCED, budget_label(thinking_tokens, waits), r, thinking_tokens)
    for r in num_steps:
        yield from run_controls(examiner, config.controls, r, max(config.thinking_tokens))


def as_result(cell: Cell, model: str, task: str) -> Result:
    """Return a cell as a row of results.csv."""
    return Result(
        model, "test", task, "", cell.mode, cell.label, None, "accuracy", cell.num_steps, cell.accuracy, cell.stderr,
        cell.n,
    )  # fmt: skip


def write_grid(cells: Sequence[Cell], out: Path, model: str) -> None:
    """Write grid.csv (one line per cell), grid.md, grid.png and frontier.png."""
    with atomic_file(out / "grid.csv") as temporary, temporary.open("w", newline="") as file:
        columns = ["mode", *(field.name for field in fields(Cell) if field.name != "mode")]
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(asdict(cell) for cell in cells)
    forced = [cell for cell in cells if cell.mode == FORCED]
    write_text(out / "grid.md", grid_markdown(forced, [cell for cell in cells if cell.mode != FORCED]))
    plot_heat_map(forced, out / "grid.png", f"{model}: accuracy, %")
    plot_frontier(forced, out / "frontier.png", f"{model}: accuracy over FLOPs")


def grid_markdown(cells: Sequence[Cell], others: Sequence[Cell]) -> str:
    """Return the tables of grid.md: accuracy, the frontier, the metrics along both axes, and all cells."""
    depths = sorted({cell.num_steps for cell in cells})
    accuracy = {(cell.label, cell.num_steps): f"{100 * cell.accuracy:.1f}" for cell in cells}
    labels = list(dict.fromkeys(cell.label for cell in cells))
    rows = [[label, *(accuracy[label, r] for r in depths)] for label in labels]
    metrics = [
        [x.axis, x.held, f"{x.control:.0%}", f"{100 * x.scaling:.3g}", f"{100 * x.performance:.1f}", str(x.runs)]
        for x in axis_reports(cells)
    ]
    parts = [
        "Accuracy, %\n",
        markdown_table(["budget", *(f"r={r}" for r in depths)], rows),
        "Frontier: cells that are more accurate than all others of at most their FLOPs\n",
        markdown_table(_COLUMNS, [_line(cell) for cell in frontier(cells)]),
        "Along either axis; scaling in percentage points per thinking token or per iteration\n",
        markdown_table(["axis", "at", "control", "scaling", "performance", "runs"], metrics),
        "All cells, and other ways to spend compute\n",
        markdown_table(_COLUMNS, [_line(cell) for cell in (*cells, *others)]),
    ]
    return "\n".join(parts)


_COLUMNS = [
    "mode", "budget", "r", "accuracy", "thinking tokens", "new tokens", "core iterations", "FLOPs", "control", "n",
]  # fmt: skip


def _line(cell: Cell) -> list[str]:
    accuracy = f"{100 * cell.accuracy:.1f} ± {100 * cell.stderr:.1f}"
    counts = [f"{value:.1f}" for value in (cell.thinking_tokens, cell.new_tokens, cell.core_iterations)]
    return [cell.mode, cell.label, str(cell.num_steps), accuracy, *counts, f"{cell.flops:.3g}",
            f"{cell.within_budget:.0%}", str(cell.n)]  # fmt: skip


def plot_heat_map(cells: Sequence[Cell], path: Path, title: str) -> None:
    """Draw accuracy in percent by iterations (rows) and thinking budget (columns)."""
    figure, (axes,) = new_figure()
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
    axes.set(xlabel="thinking budget", ylabel="iterations of the core")
    axes.set_title(title, parse_math=False)
    save_figure(figure, path)


def plot_frontier(cells: Sequence[Cell], path: Path, title: str) -> None:
    """Draw accuracy over FLOPs per question: every cell, and a line through the frontier."""
    figure, (axes,) = new_figure()
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
    axes.set(xlabel="FLOPs per question", ylabel="accuracy, %")
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", title="thinking budget; line: frontier")
    save_figure(figure, path)
