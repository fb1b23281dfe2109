"""Are exit gates calibrated? Their probabilities against the labels that they were trained on (docs/stopping-study.md).

    python -m benchmarks stopping_calibration [--tasks shell_game,...] [--seeds 0,1,2] [--workers 2] [--keep FOLDER]

Trains the backbone A of `python -m benchmarks stopping` and its gates in the same FOLDER, so that finished ones are not
trained again, and reads held-out rows at every iteration. About three quarters of an hour of one CPU thread. Writes
results/stopping_calibration.json.

Shapes: B rows, T tokens, R iterations, V vocabulary.
"""

import argparse
import multiprocessing
import os
from contextlib import redirect_stderr
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor

from benchmarks.common import kept, markdown, trained_run, write_result
from benchmarks.stopping import GATES, backbone, gate
from benchmarks.stopping_exits import CAP, ROWS, Rows
from recurrent_depth.data.tasks.state import TASKS
from recurrent_depth.model.loss import IGNORE_INDEX
from recurrent_depth.model.transformer import GradientStates, RecurrentDepthModel
from recurrent_depth.runs import load_run_model
from recurrent_depth.training.objective import LABELS, MARGIN

BACKBONE = "A last"
READ = ("backward", "forward", "accuracy")
"""Labels of the gates that are read; all gates read the state and its change."""

BINS = 10
SPANS = {"1-4": (1, 4), "5-8": (5, 8), "9-16": (9, CAP)}
"""Iterations in separate figures: in the late ones nearly every label says stop."""

FIGURES = ("label", "probability", "calibration_error", "rank_accuracy")
"""Means of label and probability, and `calibration_error` and `rank_accuracy`."""


def calibration_error(predicted: Tensor, label: Tensor) -> float:
    """Return the expected calibration error of probabilities [N]: |mean - mean label| in ten bins, by their size."""
    bins = (predicted * BINS).long().clamp(max=BINS - 1)
    off = torch.zeros(BINS, dtype=torch.double).index_add_(0, bins, (predicted - label).double())
    return (off.abs().sum() / len(label)).item()


def rank_accuracy(predicted: Tensor, label: Tensor) -> float | None:
    """Return how often a case with a label above one half has the higher probability (AUC); None without two kinds."""
    high = (label > 0.5).numpy()
    n, m = int(high.sum()), int((~high).sum())
    if not n or not m:
        return None
    return float((rankdata(predicted.numpy())[high].sum() - n * (n + 1) / 2) / (n * m))


@torch.no_grad()
def probabilities_and_labels(model: RecurrentDepthModel, rows: Rows, label: str) -> tuple[Tensor, Tensor]:
    """Return the probabilities and labels to stop [R, N] of the tokens of held-out rows; no label: NaN."""
    found: list[Tensor] = []

    def read(given: GradientStates) -> Tensor:
        assert given.gate is not None
        logits = torch.stack([F.linear(given.hidden(state), given.head) for state in given.states[1:]])  # [R, B, T, V]
        targets = given.targets.expand(CAP, -1, -1)
        losses = F.cross_entropy(logits.movedim(-1, 1), targets, reduction="none", ignore_index=IGNORE_INDEX)
        right = (logits.argmax(-1) == targets).to(losses.dtype)
        valid = given.targets != IGNORE_INDEX
        found.append(torch.stack([given.gate(*pair) for pair in pairwise(given.states)]).sigmoid()[:, valid])
        found.append(LABELS[label](losses, right, MARGIN)[:, valid])
        return torch.zeros(())

    model(rows.ids, num_steps=CAP, targets=rows.labels, objective=read)
    return found[0], found[1]


def measure(model: RecurrentDepthModel, rows: Rows, label: str) -> dict[str, dict[str, float | None]]:
    """Return the `FIGURES` of a gate by iterations."""
    probabilities, labels = probabilities_and_labels(model, rows, label)
    figures = {}
    for name, (first, last) in SPANS.items():
        predicted, wanted = probabilities[first - 1 : last].flatten(), labels[first - 1 : last].flatten()
        predicted, wanted = predicted[~wanted.isnan()], wanted[~wanted.isnan()]
        found = (wanted.mean().item(), predicted.mean().item(), calibration_error(predicted, wanted))
        figures[name] = dict(zip(FIGURES, (*found, rank_accuracy(predicted, wanted)), strict=True))
    return figures


def run_job(job: tuple[str, int], keep: Path) -> dict[str, Any]:
    """Train a backbone and its gates where they are missing, and measure the gates."""
    task, seed = job
    on, rows, found = backbone(task, seed, BACKBONE, keep), Rows(TASKS[task], 0, ROWS), {}
    with open(os.devnull, "w") as quiet, redirect_stderr(quiet):  # the progress of training
        trained_run(on)
        for label in READ:
            name = f"gate {label}"
            run = trained_run(gate(task, seed, on, name, GATES[BACKBONE][name]))
            found[name] = measure(load_run_model(run), rows, label)
    print(task, seed, flush=True)
    return {"task": task, "seed": seed, "gates": found}


def kept_job(job: tuple[str, int], keep: Path) -> dict[str, Any]:
    task, seed = job
    result: dict[str, Any] = kept(str(keep), f"{task}-{seed}-calibration", partial(run_job, job, keep))
    return result


def table(payload: dict[str, Any]) -> str:
    """Return a table of the `FIGURES` by iterations, means over seeds."""
    rows = []
    for task, name in product(payload["tasks"], (f"gate {label}" for label in READ)):
        seeds = [run["gates"][name] for run in payload["runs"] if run["task"] == task]
        cells = []
        for span in SPANS:
            means = {key: _mean([seed[span][key] for seed in seeds]) for key in FIGURES}
            cells.append(", ".join("-" if mean is None else f"{mean:.2f}" for mean in means.values()))
        rows.append([task, name.removeprefix("gate "), *cells])
    return markdown(["task", "label", *(f"iterations {span}" for span in SPANS)], rows)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--keep", default="build/stopping", help="folder of runs and finished measurements")
    args = parser.parse_args()
    tasks = args.tasks.split(",")
    jobs = [(task, int(seed)) for seed in args.seeds.split(",") for task in tasks]
    with multiprocessing.get_context("spawn").Pool(args.workers, maxtasksperchild=1) as pool:
        runs = pool.starmap(kept_job, [(job, Path(args.keep)) for job in jobs], chunksize=1)
    payload = {"tasks": tasks, "bins": BINS, "rows": ROWS, "runs": runs}
    print(table(payload))
    write_result("stopping_calibration", payload)


if __name__ == "__main__":
    main()
