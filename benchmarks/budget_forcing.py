"""Thinking after the question, and forcing it to go on: before and after training on continuations.

    python -m benchmarks budget_forcing [--seeds 0,1,2] [--bases DIR DIR DIR]

One base model a seed (configs/pretrain/reasoning/puzzles.yaml), fine-tuned for equally many steps on the same puzzles
with three kinds of traces: finished (a trace is whole and ends), rechecked (whole, then up to four times "Wait" and
the last move again), resumed (three moves, and three more after every "Wait"; rechecked when none is left). Asked with
0 to 8 forced waits, and with budgets that cut the trace. Writes results/budget_forcing.json and pictures.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks.common import RESULTS, interval, kept, write_result
from benchmarks.inline_notes import as_json, over_seeds
from benchmarks.puzzle_models import Row, draw, each_base, examiner, fine_tune, options_of, row_of
from recurrent_depth.data.tasks.puzzles import WAIT, Puzzle
from recurrent_depth.evaluation.budget_metrics import Cell, axis_reports, frontier
from recurrent_depth.evaluation.grid import FORCED, plot_frontier, plot_heat_map

DEPTHS = [1, 2, 4, 8]
WAITS = [0, 1, 2, 4, 8]
BUDGETS = [0, 8, 16]
ENOUGH = 64  # thinking tokens: no trace here needs as many
ROUND = 3  # moves of a round of the kind "resumed"
EXAMPLES, STEPS, QUESTIONS = 800, 150, 128


def finished(puzzle: Puzzle, waits: int) -> list[str]:
    return puzzle.steps(0, len(puzzle.moves))


def rechecked(puzzle: Puzzle, waits: int) -> list[str]:
    last = len(puzzle.moves)
    return puzzle.steps(0, last) + [WAIT, *puzzle.steps(last - 1, last)] * waits


def resumed(puzzle: Puzzle, waits: int) -> list[str]:
    last = len(puzzle.moves)
    words, done = puzzle.steps(0, ROUND), min(ROUND, last)
    for _ in range(waits):
        following = min(done + ROUND, last)
        words += [WAIT, *puzzle.steps(min(done, last - 1), following)]
        done = following
    return words


KINDS = {"finished": finished, "rechecked": rechecked, "resumed": resumed}


def rows_of(kind: str, seed: int) -> list[Row]:
    """The same puzzles for every kind; between 0 and 4 waits where the kind has any."""
    rng = np.random.default_rng([seed, 5])
    puzzles = draw(EXAMPLES, ["swap"], 2, 10, seed=1000 + seed)
    return [row_of(puzzle, KINDS[kind](puzzle, int(rng.integers(5)))) for puzzle in puzzles]


def measure(base: Path, kind: str, seed: int) -> list[Cell]:
    """Fine-tune on one kind of traces; the cells of forced waits and of cut traces."""
    model = fine_tune(base, rows_of(kind, seed), STEPS, seed, [WAIT])
    asks = examiner(model, draw(QUESTIONS, ["swap"], 6, 10, seed=9))
    forced = [asks.ask(r, ENOUGH, waits).cell(FORCED, f"waits={waits}", r, ENOUGH) for waits in WAITS for r in DEPTHS]
    return forced + [
        asks.ask(r, budget).cell(FORCED, f"think={budget}", r, budget) for budget in BUDGETS for r in DEPTHS
    ]


def summarise(runs: list[list[Cell]]) -> dict[str, Any]:
    cells = over_seeds(runs)
    forced = [cell for cell in cells if cell.label.startswith("waits")]
    intervals = [interval([run[index].accuracy for run in runs]) for index in range(len(cells))]
    return {
        "cells": [
            dataclasses.asdict(cell) | {"interval_95": bounds} for cell, bounds in zip(cells, intervals, strict=True)
        ],
        "waits": [dataclasses.asdict(report) for report in axis_reports(forced)],
        "frontier": as_json(frontier(cells)),
        "runs": [as_json(run) for run in runs],
    }


def plot_waits(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Accuracy over forced waits, one panel a kind, one line a number of steps; bars are 95% intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(results), figsize=(4 * len(results), 3.6), sharey=True, layout="constrained")
    for panel, (kind, result) in zip(panels, results.items(), strict=True):
        for r in DEPTHS:
            line = [c for c in result["cells"] if c["num_steps"] == r and c["label"].startswith("waits")]
            means = [100 * c["accuracy"] for c in line]
            bars = [100 * (c["interval_95"][1] - c["accuracy"]) for c in line]
            panel.errorbar(WAITS, means, bars, marker="o", capsize=3, label=f"r = {r}")
        panel.set(xlabel="forced waits", title=kind)
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="accuracy, %", ylim=(0, 104))
    panels[-1].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_table(kind: str, cells: list[dict[str, Any]]) -> None:
    labels = list(dict.fromkeys(cell["label"] for cell in cells))
    print(f"\n{kind}\n| r | " + " | ".join(labels) + " |\n|" + "---|" * (1 + len(labels)))
    for r in DEPTHS:
        values = [f"{100 * cell['accuracy']:.1f}" for cell in cells if cell["num_steps"] == r]
        print(f"| {r} | " + " | ".join(values) + " |")


def main() -> None:
    options = options_of(__doc__)
    runs: dict[str, list[list[Cell]]] = {kind: [] for kind in KINDS}
    for seed, base in each_base(options):
        for kind in KINDS:
            cells = kept(options.keep, f"{kind}-{seed}", lambda b=base, k=kind, s=seed: as_json(measure(b, k, s)))
            runs[kind].append([Cell(**cell) for cell in cells])
    results = {kind: summarise(of_kind) for kind, of_kind in runs.items()}
    for kind, result in results.items():
        print_table(kind, result["cells"])
    settings = {"seeds": options.seeds, "examples": EXAMPLES, "steps": STEPS, "questions": QUESTIONS, "moves": [6, 10]}
    write_result("budget_forcing", {**settings, "kinds": results})
    plot_waits(results, RESULTS / "budget_forcing.png")
    cells = over_seeds(runs["resumed"])
    plot_heat_map(cells, RESULTS / "budget_forcing_grid.png", "resumed traces: accuracy, %")
    plot_frontier(cells, RESULTS / "budget_forcing_frontier.png", "resumed traces: accuracy over FLOPs")


if __name__ == "__main__":
    main()
