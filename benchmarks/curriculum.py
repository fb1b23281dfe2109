"""Does a curriculum on depth help? The quickstart's recipe with ramps of the mean depth, at equal FLOPs.

    python -m benchmarks curriculum [--seeds 0,1,2] [--budgets 0.25,1] [--ramps "linear,1 - sqrt"] [--keep FOLDER]

Ramps run over 60% of the training steps, from a mean depth of one. A ramp makes early training steps cheaper, so that a
run with it has more of them: the mean FLOPs, summed over the training steps, are those of the recipe without a ramp. A
budget is a share of the recipe's training steps. Every finished run is kept, and the same command continues after an
interruption. A run takes one to two minutes of one CPU thread. Writes results/curriculum.json.
"""

import argparse
import dataclasses
import multiprocessing
import os
import sys
import tempfile
from functools import partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.common import interval, kept, markdown, trained_run, write_result
from benchmarks.quickstart_seeds import config_of, with_steps
from recurrent_depth.data.tasks.source import curriculum
from recurrent_depth.data.tasks.state import TASKS
from recurrent_depth.evaluation.generated import evaluate_per_position
from recurrent_depth.model.flops import mean_training_flops, training_flops
from recurrent_depth.model.recurrence import sample_depth
from recurrent_depth.runs import load_run_model
from recurrent_depth.training.config import DepthRampConfig, RunConfig
from recurrent_depth.training.optimizer import ramped

SHARE = 0.6  # of the training steps: where looped_nanochat measured its best loss
RAMPS: dict[str, dict[str, Any]] = {
    "none": {},
    "linear": {"shape": "linear"},
    "linear + backprop": {"shape": "linear", "backprop": True},
    "1 - sqrt": {"shape": "one_minus_sqrt"},
    "1 - sqrt + backprop": {"shape": "one_minus_sqrt", "backprop": True},
}
"""Options of each curriculum; the first is the recipe as it is."""

DEPTHS = (4, 8, 16, 32)
DRAWS = 256  # sampled depths behind the mean FLOPs of a training step


def config_for(ramp: str, steps: int, seed: int = 0) -> RunConfig:
    """Return the quickstart's recipe with a ramp and another number of training steps."""
    config = with_steps(config_of("shell-game"), steps, seed)
    if not RAMPS[ramp]:
        return config
    return dataclasses.replace(config, depth_ramp=DepthRampConfig(steps=max(1, round(SHARE * steps)), **RAMPS[ramp]))


def mean_flops(ramp: str, steps: int) -> float:
    """Return the mean training FLOPs of a row, summed over the training steps."""
    config = config_for(ramp, steps)
    return sum(
        mean_training_flops(ramped(config.model, config.depth_ramp, step), tokens(config, step), draws=DRAWS)
        for step in range(steps)
    )


def sampled_flops(config: RunConfig) -> int:
    """Return the FLOPs of a run with its own sampled depths."""
    total = 0
    for step in range(config.steps):
        model = ramped(config.model, config.depth_ramp, step)
        depth = sample_depth(model, seed=config.seed, step=step, micro_step=0)
        total += config.batch_size * training_flops(model, tokens(config, step), *depth)
    return total


def tokens(config: RunConfig, step: int) -> int:
    """Return the tokens of a row at a training step."""
    assert config.data.task is not None
    return 1 + curriculum(config.data.task, step, config.steps, "train")


def equal_flops_steps(ramp: str, steps: int) -> int:
    """Return the training steps of a run with this ramp whose FLOPs are those of `steps` without one."""
    wanted, low, high = mean_flops("none", steps), steps, 4 * steps
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if mean_flops(ramp, middle) < wanted else (low, middle)
    return low


def train_and_evaluate(ramp: str, steps: int, seed: int) -> dict[str, Any]:
    """Train one model; return its FLOPs and its accuracy by core iterations and difficulty."""
    config = config_for(ramp, steps, seed)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as quiet:
        sys.stderr = quiet
        model = load_run_model(trained_run(dataclasses.replace(config, out=f"{folder}/run")))
    accuracy: dict[str, dict[str, float]] = {str(r): {} for r in DEPTHS}
    for result in evaluate_per_position(model, ramp, TASKS["shell_game"], DEPTHS):
        accuracy[str(result.num_steps)][result.difficulty] = round(result.value, 4)
    return {"flops": sampled_flops(config), "accuracy": accuracy}


def run_job(job: dict[str, Any], keep: str) -> dict[str, Any]:
    """Return a job with its results, from `keep` if it is there."""
    name = "-".join(str(job[key]) for key in ("ramp", "steps", "seed")).replace(" ", "")
    return job | kept(keep, name, partial(train_and_evaluate, job["ramp"], job["steps"], job["seed"]))


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean accuracy of each budget and ramp by core iterations, and its difference from no ramp by seed."""
    values: dict[tuple[float, str, str, str], dict[int, float]] = {}
    for run in runs:
        for r, by_difficulty in run["accuracy"].items():
            for difficulty, value in by_difficulty.items():
                values.setdefault((run["budget"], run["ramp"], r, difficulty), {})[run["seed"]] = value
    rows = []
    for (budget, ramp, r, difficulty), by_seed in values.items():
        gains = [value - values[budget, "none", r, difficulty][seed] for seed, value in by_seed.items()]
        rows.append(
            {
                "budget": budget, "ramp": ramp, "num_steps": int(r), "difficulty": difficulty,
                "mean": sum(by_seed.values()) / len(by_seed), "values": list(by_seed.values()),
                "gain": sum(gains) / len(gains), "gain_interval_95": interval(gains),
            }
        )  # fmt: skip
    return rows


def table(payload: dict[str, Any], difficulty: str = "all") -> str:
    """Return the table of docs/model.md: accuracy in percent by budget, ramp and core iterations."""
    cells = {(row["budget"], row["ramp"], row["num_steps"], row["difficulty"]): row for row in payload["summary"]}
    steps = {(run["budget"], run["ramp"]): run["steps"] for run in payload["runs"]}
    rows = []
    for (budget, ramp), count in steps.items():
        accuracy = [f"{100 * cells[budget, ramp, r, difficulty]['mean']:.1f}" for r in DEPTHS]
        low, high = (100 * bound for bound in cells[budget, ramp, 8, difficulty]["gain_interval_95"])
        gain = "" if ramp == "none" else f"{low:+.1f} to {high:+.1f}"
        rows.append([f"{budget:g}", ramp, f"{count:,}", *accuracy, gain])
    head = ["budget", "ramp", "training steps", *(f"r = {r}" for r in DEPTHS), "gain at r = 8, 95% interval"]
    return markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--budgets", default="0.25,1", help="shares of the recipe's training steps")
    parser.add_argument("--ramps", default=",".join(RAMPS), help="curricula to compare with none")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--keep", default="build/curriculum", help="folder of finished runs")
    options = parser.parse_args()
    ramps, jobs = list(dict.fromkeys(["none", *options.ramps.split(",")])), []
    if unknown := [ramp for ramp in ramps if ramp not in RAMPS]:
        parser.error(f"--ramps: there is no {unknown[0]!r}; known are {', '.join(RAMPS)}")
    for budget in map(float, options.budgets.split(",")):
        reference = round(config_of("shell-game").steps * budget)
        counts = {ramp: equal_flops_steps(ramp, reference) for ramp in ramps}
        planned = {ramp: mean_flops(ramp, steps) / mean_flops("none", reference) for ramp, steps in counts.items()}
        print(budget, counts, planned, flush=True)
        jobs += [
            {"budget": budget, "ramp": ramp, "steps": counts[ramp], "planned_flops": planned[ramp], "seed": int(seed)}
            for ramp in ramps
            for seed in options.seeds.split(",")
        ]
    with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=1) as pool:
        runs = pool.starmap(run_job, [(job, options.keep) for job in jobs], chunksize=1)
    rows = summary(runs)
    payload = {"ramp_share": SHARE, "summary": rows, "runs": runs}
    print(table(payload))
    write_result("curriculum", payload)


if __name__ == "__main__":
    main()
