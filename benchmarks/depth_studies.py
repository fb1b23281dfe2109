"""Depth studies on the shell game: do harder tokens converge later, and what does one curve over iterations hide?

    python -m benchmarks depth_studies --keep /tmp/depth-studies

Trains the quickstart's model with seeds 1, 2 and 3, and with seed 1 at other mean depths, each on one thread. With
--keep, finished runs stay in that folder, and the same command continues after an interruption. The needed depth of a
token is the first iteration from which the answer is right and stays right; it is compared with the iterations at which
the exit rules fire, over the last tokens of games of one length.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from benchmarks.common import trained_run, write_result
from recurrent_depth.analysis.convergence import parse_rule
from recurrent_depth.analysis.studies.categories import correlations, stops_of
from recurrent_depth.analysis.studies.statistics import rank_correlation
from recurrent_depth.data.tasks.state import TASKS, VALIDATION_SPLIT
from recurrent_depth.evaluation.generated import evaluate_per_position
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.parsing import parse_options
from recurrent_depth.runs import load_run_model
from recurrent_depth.training.config import TrainCommand

CONFIG = Path(__file__).parents[1] / "configs" / "pretrain" / "quickstart" / "shell-game.yaml"
SEEDS, DEPTHS, TRAINED = (1, 2, 3), (2, 4, 16), 8
RULES = ("state-change", "kl", "entropy", "argmax")
ROWS, LENGTH, MOST = 256, 16, 32
NUM_STEPS = [1, 2, 4, 8, 12, 16, 32]


def trained(folder: Path, seed: int, depth: int) -> RecurrentDepthModel:
    """Return the model of a seed and a mean depth, trained unless the folder has it."""
    run = folder / f"seed-{seed}-depth-{depth}"
    options = parse_options(TrainCommand, [
        "--config", str(CONFIG), "--out", str(run), "--seed", str(seed), "--model.mean-recurrence", str(depth),
        "--model.mean-backprop-depth", str(min(4, depth)),
    ]).run_config()  # fmt: skip
    return load_run_model(trained_run(options))


@torch.no_grad()
def hard_tokens(model: RecurrentDepthModel, seed: int) -> dict[str, Any]:
    """Return the rank correlations of a model, and how many tokens each number of needed iterations has."""
    task = TASKS["shell_game"]
    ids, labels = task.rows(0, ROWS, LENGTH, seed=0, split=VALIDATION_SPLIT)
    rules = [parse_rule(name)[1] for name in RULES]
    rows = [
        stops_of(model, row, rules, MOST, [""] * (LENGTH + 1), answers)
        for row, answers in zip(ids.tolist(), labels, strict=True)
    ]
    needed = np.array([row.needed[-1] for row in rows])
    ordered = correlations([row.times[:, -1] for row in rows], needed.tolist())
    alone = [rank_correlation(times, needed) for times in np.stack([row.first[:, -1] for row in rows]).T]
    return {
        "seed": seed,
        "needed": {str(value): int((needed == value).sum()) for value in sorted(set(needed.tolist()))},
        "rules": [
            {"rule": name, "in order": list(a), "alone": list(b)}
            for name, a, b in zip(RULES, ordered, alone, strict=True)
        ],
    }


def curve(model: RecurrentDepthModel, depth: int) -> dict[str, Any]:
    """Return accuracy over iterations of a model trained at a mean depth."""
    results = evaluate_per_position(model, "", TASKS["shell_game"], NUM_STEPS, rows=ROWS)
    cells = {str(r.num_steps): [r.value, r.stderr] for r in results if r.difficulty == "all"}
    return {"trained": depth, "accuracy": cells}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", help="folder for the runs; default: a temporary one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.keep or scratch)
        seeds = [hard_tokens(trained(folder, seed, TRAINED), seed) for seed in SEEDS]
        curves = [curve(trained(folder, SEEDS[0], depth), depth) for depth in sorted((*DEPTHS, TRAINED))]
    write_result("depth_studies", {"games": ROWS, "swaps": LENGTH, "max_steps": MOST, "seeds": seeds, "curves": curves})


if __name__ == "__main__":
    main()
