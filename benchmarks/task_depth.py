"""Does a generated task need depth? Train the quickstart's model on it over seeds; compare r = 4 and r = 16.

    python -m benchmarks task_depth --tasks modular_arithmetic --seeds 0,1,2 --workers 2

Accepted as a task that needs depth: r = 16 beats r = 4 by 15 points on its hardest bucket, on the mean over seeds.
"""

import argparse
import dataclasses
import multiprocessing
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.common import trained_run, write_result
from recurrent_depth.data.tasks.state import TASKS
from recurrent_depth.evaluation.generated import evaluate_per_position
from recurrent_depth.parsing import parse_options
from recurrent_depth.runs import load_run_model
from recurrent_depth.training.config import TrainCommand

CONFIG = Path(__file__).parents[1] / "configs" / "pretrain" / "quickstart" / "shell-game.yaml"
DEPTHS = [1, 2, 4, 8, 16, 32]


def run_job(job: tuple[str, int, int]) -> dict[str, Any]:
    """Train one model; accuracy by depth and bucket."""
    task, seed, steps = job
    arguments = ["--config", str(CONFIG), "--data.task.name", task, "--seed", str(seed), "--steps", str(steps)]
    arguments += ["--optimizer.cooldown_steps", str(steps // 4)]
    config = parse_options(TrainCommand, arguments).run_config()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as quiet:
        sys.stderr = quiet
        model = load_run_model(trained_run(dataclasses.replace(config, out=f"{folder}/run")))
    results = evaluate_per_position(model, task, TASKS[task], DEPTHS)
    accuracy: dict[str, dict[str, float]] = {f"r{r}": {} for r in DEPTHS}
    for result in results:
        accuracy[f"r{result.num_steps}"][result.difficulty] = round(result.value, 4)
    return {"task": task, "seed": seed, "steps": steps, "accuracy": accuracy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default="modular_arithmetic,permutation_automaton")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    tasks, seeds = options.tasks.split(","), [int(s) for s in options.seeds.split(",")]
    jobs = [(task, seed, options.steps) for task in tasks for seed in seeds]
    with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=1) as pool:
        runs = pool.map(run_job, jobs, chunksize=1)
    verdicts = []
    for task in tasks:
        own = [run["accuracy"] for run in runs if run["task"] == task]
        means = {r: round(statistics.mean(a[f"r{r}"]["13-16"] for a in own), 4) for r in DEPTHS}
        gain = round(means[16] - means[4], 4)
        verdicts.append({"task": task, "hardest_bucket_mean": means, "gain_16_over_4": gain, "accepted": gain >= 0.15})
        print(verdicts[-1])
    write_result("task_depth", {"verdicts": verdicts, "runs": runs})


if __name__ == "__main__":
    main()
