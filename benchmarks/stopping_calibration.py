"""Are exit gates calibrated? Their probabilities against the labels that they were trained on (docs/stopping-study.md).

    python -m benchmarks stopping_calibration [--tasks shell_game,...] [--seeds 0,1,2] [--workers 2] [--keep FOLDER]

Trains the backbone A of `python -m benchmarks stopping` and its gates in the same FOLDER, so that finished ones are not
trained again, and reads held-out rows at every iteration. About half an hour of one CPU thread. With all
tasks and several seeds it writes results/stopping_calibration.json.

Shapes: N tokens, R iterations.
"""

import argparse
import multiprocessing
import os
from contextlib import redirect_stderr
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks.common import kept, markdown, trained_run, write_result
from benchmarks.stopping import GATES, backbone, gate
from benchmarks.stopping_exits import CAP, ROWS, Rows
from recurrent_depth.data.tasks.state import TASKS
from recurrent_depth.model.loss import IGNORE_INDEX
from recurrent_depth.model.transformer import GradientStates, RecurrentDepthModel
from recurrent_depth.runs import load_run_model
from recurrent_depth.training.config import RunConfig
from recurrent_depth.training.objective import gate_labels, gate_logits

BACKBONE = "A last"
MEASURED = ("gate backward", "gate forward", "gate accuracy")
"""Gates on it, named by their labels; all take the state and its change."""

BINS = 10
SPANS = {"1-4": (1, 4), "5-8": (5, 8), "9-16": (9, CAP)}
"""Iterations with separate metrics: in the late ones nearly every label says stop."""

METRICS = ("label", "probability", "calibration_error", "auroc")
"""Mean label, mean probability, expected calibration error, area under the ROC curve."""


def calibration_error(probability: Tensor, label: Tensor) -> float:
    """Return the expected calibration error of probabilities [N].

    |mean probability - mean label| over ten bins of equal width, weighted by the cases in each.
    """
    bins = (probability * BINS).long().clamp(max=BINS - 1)
    off = torch.zeros(BINS, dtype=torch.double).index_add_(0, bins, (probability - label).double())
    return (off.abs().sum() / len(label)).item()


def auroc(probability: Tensor, label: Tensor) -> float | None:
    """Return how often a token that should stop has a higher probability than one that should not.

    Tokens [R, N] are compared after the same iteration; the mean over iterations at which both kinds exist, None if
    there is none. Labels above one half say stop.
    """
    found = []
    for p, stop in zip(probability, label > 0.5, strict=True):
        if stop.any() and not stop.all():
            found.append(float(roc_auc_score(stop, p)))
    return fmean(found) if found else None


@torch.no_grad()
def probabilities_and_labels(model: RecurrentDepthModel, rows: Rows, config: RunConfig) -> tuple[Tensor, Tensor]:
    """Return the probabilities and labels to stop [R, N] of held-out tokens; NaN: no label."""
    found: list[Tensor] = []
    labelled = config.objective.labelled
    assert labelled is not None

    def read(given: GradientStates) -> Tensor:
        valid = given.targets != IGNORE_INDEX
        found.extend([gate_logits(given).sigmoid()[:, valid], gate_labels(given, labelled)[:, valid]])
        return torch.zeros(())

    model(rows.ids, num_steps=CAP, targets=rows.labels, objective=read)
    return found[0], found[1]


def measure(model: RecurrentDepthModel, rows: Rows, config: RunConfig) -> dict[str, dict[str, float | None]]:
    """Return the `METRICS` of a gate by iterations."""
    probabilities, labels = probabilities_and_labels(model, rows, config)
    known = ~labels.isnan().any(1)  # the first or the last iteration has no label
    metrics = {}
    for name, (first, last) in SPANS.items():
        chosen = [t for t in range(first - 1, last) if known[t]]
        p, label = probabilities[chosen], labels[chosen]
        found = (label.mean().item(), p.mean().item(), calibration_error(p.flatten(), label.flatten()))
        metrics[name] = dict(zip(METRICS, (*found, auroc(p, label)), strict=True))
    return metrics


def run_job(job: tuple[str, int], keep: Path) -> dict[str, Any]:
    """Train a backbone and its gates where they are missing, and measure the gates."""
    task, seed = job
    config = backbone(task, seed, BACKBONE, keep)
    rows = Rows(TASKS[task], 0, ROWS)
    found = {}
    with open(os.devnull, "w") as quiet, redirect_stderr(quiet):  # the progress of training
        trained_run(config)
        for name in MEASURED:
            on_backbone = gate(task, seed, config, name, GATES[BACKBONE][name])
            found[name] = measure(load_run_model(trained_run(on_backbone)), rows, on_backbone)
    print(task, seed, flush=True)
    return {"task": task, "seed": seed, "gates": found}


def kept_job(job: tuple[str, int], keep: Path) -> dict[str, Any]:
    task, seed = job
    result: dict[str, Any] = kept(str(keep), f"{task}-{seed}-calibration", partial(run_job, job, keep))
    return result


def table(payload: dict[str, Any]) -> str:
    """Return a table of the `METRICS` by iterations, means over seeds."""
    rows = []
    for task, name in product(payload["tasks"], MEASURED):
        seeds = [run["gates"][name] for run in payload["runs"] if run["task"] == task]
        cells = []
        for span in SPANS:
            means = [_mean([seed[span][metric] for seed in seeds]) for metric in METRICS]
            cells.append(", ".join("-" if mean is None else f"{mean:.2f}" for mean in means))
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
    tasks, seeds = args.tasks.split(","), [int(seed) for seed in args.seeds.split(",")]
    jobs = [(task, seed) for seed in seeds for task in tasks]
    with multiprocessing.get_context("spawn").Pool(args.workers, maxtasksperchild=1) as pool:
        runs = pool.starmap(kept_job, [(job, Path(args.keep)) for job in jobs], chunksize=1)
    payload = {"tasks": tasks, "bins": BINS, "rows": ROWS, "runs": runs}
    print(table(payload))
    if tasks == list(TASKS) and len(seeds) > 1:
        write_result("stopping_calibration", payload)


if __name__ == "__main__":
    main()
