"""Two axes of test-time compute: steps of the core, and notes that the model writes while it reads.

    python -m benchmarks inline_notes [--seeds 0,1,2]

Trains configs/pretrain/reasoning/inline-notes.yaml once a seed (about four minutes of one core each). At test time the
model writes its own note every m letters; asked is the state after the last of 16 letters. Writes
results/inline_notes.json and two pictures.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.common import RESULTS, interval, kept, trained_run, write_result
from recurrent_depth.data.tasks.notes import note_id
from recurrent_depth.data.tasks.state import TASKS
from recurrent_depth.evaluation.budget_metrics import Cell, axis_reports, best_within, cheapest_reaching, frontier
from recurrent_depth.evaluation.generated import VALIDATION_SPLIT
from recurrent_depth.evaluation.grid import plot_frontier, plot_heat_map
from recurrent_depth.generation.cache import RecurrentCache
from recurrent_depth.generation.tokens import Tokens
from recurrent_depth.model.flops import forward_flops
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.parsing import parse_options
from recurrent_depth.runs import load_run_model
from recurrent_depth.training.config import TrainCommand

CONFIG = Path(__file__).parents[1] / "configs" / "pretrain" / "reasoning" / "inline-notes.yaml"
TASK = TASKS["permutation_automaton"]
DEPTHS = [1, 2, 3, 4, 6, 8, 12, 16, 32]
EVERY = [None, 8, 4, 2, 1]
LENGTH, ROWS = 16, 256


@torch.no_grad()
def final_states(model: RecurrentDepthModel, num_steps: int, every: int | None) -> tuple[torch.Tensor, int]:
    """Which rows name the right last state, [ROWS], and the tokens of a row. Notes are the model's own words."""
    ids, states = TASK.rows(0, ROWS, LENGTH, seed=0, split=VALIDATION_SPLIT)
    tokens, read = Tokens(model, RecurrentCache(model.config, ROWS, 3 * LENGTH + 1, num_steps)), 0
    note = torch.full((ROWS, 1), note_id(TASK))
    first, ahead = ids[:, :1], ids[:, 1:]
    for start in range(0, LENGTH, every or LENGTH):
        letters = ahead[:, start : start + (every or LENGTH)]
        last = start + letters.shape[1] == LENGTH
        chunk = torch.cat([first, letters] if last else [first, letters, note], dim=1)
        said = tokens.feed(chunk, read, num_steps)[:, -1:, : len(TASK.states)].argmax(-1)
        first, read = said, read + chunk.shape[1]
    return said[:, 0] == states[:, -1], read


def measure(model: RecurrentDepthModel) -> list[Cell]:
    cells = []
    for every in EVERY:
        for r in DEPTHS:
            right, tokens = final_states(model, r, every)
            accuracy = right.double().mean().item()
            notes = 0 if every is None else 2 * (-(-LENGTH // every) - 1)
            cells.append(
                Cell(
                    label="no notes" if every is None else f"every {every}",
                    num_steps=r,
                    accuracy=accuracy,
                    stderr=(accuracy * (1 - accuracy) / ROWS) ** 0.5,
                    n=ROWS,
                    thinking_tokens=notes,
                    new_tokens=notes + 1,
                    core_iterations=r * tokens,
                    flops=forward_flops(model.config, tokens, r),
                )
            )
    return cells


def as_json(cells: list[Cell]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(cell) for cell in cells]


def over_seeds(runs: list[list[Cell]]) -> list[Cell]:
    """Mean cells; `stderr` is that of the mean over seeds."""
    merged = []
    for same in zip(*runs, strict=True):
        values = [cell.accuracy for cell in same]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else same[0].stderr
        merged.append(dataclasses.replace(same[0], accuracy=statistics.mean(values), stderr=error))
    return merged


def train_seed(seed: int) -> RecurrentDepthModel:
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--config", str(CONFIG), "--seed", str(seed), "--out", f"{folder}/run"]
        return load_run_model(trained_run(parse_options(TrainCommand, arguments).run_config()))


def summary(cells: list[Cell], runs: list[list[Cell]]) -> dict[str, Any]:
    budgets = sorted({cell.flops for cell in cells})
    best = [(flops, best_within(cells, flops)) for flops in budgets]
    return {
        "grid": [
            dataclasses.asdict(cell) | {"interval_95": interval([run[i].accuracy for run in runs])}
            for i, cell in enumerate(cells)
        ],
        "frontier": as_json(frontier(cells)),
        "best_by_budget": [
            {"flops": flops, "num_steps": cell.num_steps, "notes": cell.label, "accuracy": cell.accuracy}
            for flops, cell in best
            if cell is not None
        ],
        "cheapest_99": {
            label: dataclasses.asdict(cell)
            for label in dict.fromkeys(cell.label for cell in cells)
            if (cell := cheapest_reaching([c for c in cells if c.label == label], 0.99)) is not None
        },
        "axes": [dataclasses.asdict(report) for report in axis_reports(cells)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--models", nargs="*", help="trained run folders instead of training, one a seed")
    parser.add_argument("--keep", help="folder that keeps what each seed gave, so that an interrupted run goes on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    runs = []
    for index, seed in enumerate(seeds):

        def of_seed(i: int = index, s: int = seed) -> list[dict[str, Any]]:
            return as_json(measure(load_run_model(options.models[i]) if options.models else train_seed(s)))

        runs.append([Cell(**cell) for cell in kept(options.keep, f"seed-{seed}", of_seed)])
    cells = over_seeds(runs)
    result = summary(cells, runs)
    print("| r | " + " | ".join(dict.fromkeys(cell.label for cell in cells)) + " |")
    for r in DEPTHS:
        print(f"| {r} | " + " | ".join(f"{100 * c.accuracy:.1f}" for c in cells if c.num_steps == r) + " |")
    for row in result["frontier"]:
        print(f"{row['flops']:.3g} FLOPs: r={row['num_steps']}, {row['label']}, {100 * row['accuracy']:.1f}%")
    runs_json = [as_json(run) for run in runs]
    write_result("inline_notes", {"seeds": seeds, "length": LENGTH, "rows": ROWS, **result, "runs": runs_json})
    plot_heat_map(cells, RESULTS / "inline_notes_grid.png", f"final state after {LENGTH} letters, %")
    plot_frontier(cells, RESULTS / "inline_notes_frontier.png", "steps or notes? accuracy over FLOPs")


if __name__ == "__main__":
    main()
