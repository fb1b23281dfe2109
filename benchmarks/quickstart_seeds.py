"""The quickstart's models over seeds: the recurrent one, and both baselines at equal tokens and FLOPs.

    python -m benchmarks quickstart_seeds --workers 2 --keep /tmp/quickstart-seeds

Seconds per training step are measured first, the three models by turns on one thread. With --keep, what is finished is
kept in that folder, and the same command continues after an interruption.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.common import kept, trained_run, write_result
from recurrent_depth.data.tasks.source import curriculum
from recurrent_depth.data.tasks.state import TASKS
from recurrent_depth.evaluation.generated import evaluate_per_position
from recurrent_depth.model.flops import training_flops
from recurrent_depth.model.recurrence import sample_depth
from recurrent_depth.parsing import parse_options
from recurrent_depth.runs import load_run_model
from recurrent_depth.training.config import RunConfig, TrainCommand
from recurrent_depth.training.parallel import start_processes
from recurrent_depth.training.trainer import Trainer

CONFIGS = Path(__file__).parents[1] / "configs" / "pretrain" / "quickstart"
MODELS = ("shell-game", "depth-1", "fixed-10")
DEPTHS = [1, 2, 4, 8, 12, 16, 32, 64]


def config_of(model: str) -> RunConfig:
    return parse_options(TrainCommand, ["--config", str(CONFIGS / f"{model}.yaml")]).run_config()


def seconds_per_step(rounds: int = 60) -> dict[str, float]:
    """Return the mean seconds of a training step over a run; the models take turns, so that noise meets all alike."""
    trainers = {model: Trainer(config_of(model), start_processes(config_of(model).runtime)) for model in MODELS}
    for trainer in trainers.values():
        trainer.train_step()
    totals = dict.fromkeys(MODELS, 0.0)
    for number in range(rounds):
        for model, trainer in trainers.items():
            trainer.step = number * trainer.config.steps // rounds
            began = time.perf_counter()
            trainer.train_step()
            totals[model] += time.perf_counter() - began
    return {model: total / rounds for model, total in totals.items()}


def flops_and_tokens(config: RunConfig) -> tuple[int, int]:
    """Return the FLOPs and the tokens of a whole run, from its depths and row lengths."""
    flops = tokens = 0
    for step in range(config.steps):
        length = 1 + curriculum(config.data.task, step, config.steps, "train")
        depth = sample_depth(config.model, seed=config.seed, step=step, micro_step=0)
        flops += config.batch_size * training_flops(config.model, length, *depth)
        tokens += config.batch_size * length
    return flops, tokens


def with_steps(config: RunConfig, steps: int, seed: int) -> RunConfig:
    cooldown = config.optimizer.cooldown_steps * steps // config.steps
    optimizer = dataclasses.replace(config.optimizer, cooldown_steps=cooldown)
    return dataclasses.replace(config, steps=steps, seed=seed, optimizer=optimizer)


def plan(seeds: list[int], baseline_seeds: list[int]) -> list[dict[str, Any]]:
    """Return every training: model, budget, steps, seed."""
    reference = config_of("shell-game")
    flops, _ = flops_and_tokens(reference)
    jobs = [{"model": "shell-game", "budget": "reference", "steps": reference.steps, "seed": s} for s in seeds]
    for model in MODELS[1:]:
        own, _ = flops_and_tokens(with_steps(config_of(model), reference.steps, 0))
        steps = {"tokens": reference.steps, "flops": int(reference.steps * flops / own)}
        jobs += [{"model": model, "budget": b, "steps": n, "seed": s} for b, n in steps.items() for s in baseline_seeds]
    return jobs


def run_job(job: dict[str, Any], keep: str | None) -> dict[str, Any]:
    """Return the job with its results, from `keep` if it is there."""
    name = "-".join(str(job[key]) for key in ("model", "budget", "steps", "seed"))
    return kept(keep, name, lambda: train_and_evaluate(job))


def train_and_evaluate(job: dict[str, Any]) -> dict[str, Any]:
    """Train one model, and return the job with parameters, tokens, FLOPs and accuracy."""
    config = with_steps(config_of(job["model"]), job["steps"], job["seed"])
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as quiet:
        sys.stderr = quiet
        run = trained_run(dataclasses.replace(config, out=f"{folder}/run"))
        model = load_run_model(run)
    depths = DEPTHS if job["model"] == "shell-game" else [1]
    results = evaluate_per_position(model, job["model"], TASKS["shell_game"], depths)
    flops, tokens = flops_and_tokens(config)
    accuracy: dict[str, dict[str, float]] = {f"r{r.num_steps}": {} for r in results}
    for r in results:
        accuracy[f"r{r.num_steps}"][r.difficulty] = round(r.value, 4)
    done = {**job, "parameters": model.num_parameters, "tokens": tokens, "flops": flops, "accuracy": accuracy}
    print(json.dumps({k: v for k, v in done.items() if k != "accuracy"}), flush=True)
    return done


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean, smallest and largest accuracy of each (model, budget, iterations, difficulty)."""
    groups: dict[tuple[str, str, str, str], list[float]] = {}
    for run in runs:
        for depth, buckets in run["accuracy"].items():
            for difficulty, value in buckets.items():
                groups.setdefault((run["model"], run["budget"], depth, difficulty), []).append(value)
    names = ("model", "budget", "num_steps", "difficulty")
    return [
        {**dict(zip(names, key, strict=True)), "mean": round(statistics.mean(v), 4), "min": min(v), "max": max(v),
         "seeds": len(v)}
        for key, v in groups.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2,3,4,5,6,7,8,9", help="of the recurrent model")
    parser.add_argument("--baseline-seeds", default="0,1,2")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", help="folder for finished trainings")
    options = parser.parse_args()
    seeds, baseline_seeds = ([int(s) for s in text.split(",")] for text in (options.seeds, options.baseline_seeds))
    pace = kept(options.keep, "seconds-per-step", seconds_per_step)
    print({model: f"{1000 * value:.1f} ms per step" for model, value in pace.items()}, flush=True)
    jobs = sorted(plan(seeds, baseline_seeds), key=lambda job: -job["steps"] * pace[job["model"]])
    with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=1) as pool:
        runs = pool.starmap(run_job, [(job, options.keep) for job in jobs], chunksize=1)
    runs.sort(key=lambda run: (run["model"], run["budget"], run["seed"]))
    table = summary(runs)
    write_result("quickstart_seeds", {"seconds_per_step": pace, "summary": table, "runs": runs})
    for row in table:
        if row["difficulty"] in ("all", "13-16"):
            print(" ".join(str(value) for value in row.values()))


if __name__ == "__main__":
    main()
