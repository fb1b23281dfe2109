"""Compare exit gates with exit rules on the same models and rows (docs/stopping-study.md).

    python -m benchmarks stopping [--tasks shell_game,...] [--seeds 0,1,2] [--workers 2] [--keep FOLDER]

--backbones measures some of them, and --add keeps the results of the others; --report writes what is finished.

Per task and seed: trains the backbones with equal tokens, exit gates on some of them with their weights frozen, and
measures every way of stopping at several mean numbers of iterations, with thresholds chosen on other rows. Every run
and measurement is kept in FOLDER, and the same command continues after an interruption. About five hours of one CPU
thread. Writes results/stopping.json and results/stopping.png.
"""

import argparse
import multiprocessing
import os
import time
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.common import kept, read_result, trained_run, write_result
from benchmarks.curriculum import tokens
from benchmarks.quickstart_seeds import CONFIGS
from benchmarks.stopping_exits import ALL_RULES, CAP, measure
from benchmarks.stopping_report import backbone_table, contrast_table, plot, summary, table, with_earlier
from recurrent_depth.data.tasks.state import TASKS
from recurrent_depth.model.recurrence import sample_depth
from recurrent_depth.parsing import parse_options
from recurrent_depth.quickstart import read_cost
from recurrent_depth.runs import load_run_model
from recurrent_depth.training.config import RunConfig, TrainCommand
from recurrent_depth.training.objective import micro_step_flops

STEPS, GATE_STEPS = 1200, 500
JOINT = {"model.gate.input": "state_and_change", "model.gate.bias": -3}
BACKBONES: dict[str, dict[str, Any]] = {
    "A last": {},
    "B every": {"objective.every.reads": 1000},  # all iterations
    "C gated .05": {**JOINT, "objective.gated.beta": 0.05},
    "C gated .1": {**JOINT, "objective.gated.beta": 0.1},
    "D distilled": {"objective.self_distilled.decay_steps": STEPS},
    "A last, FLOPs of B": {},
}
"""Objective of each backbone. All iterations carry gradient, so that every objective can read them all."""

MATCHED = {"A last, FLOPs of B": "B every"}
"""Backbones that train for as many steps as make the FLOPs of another one."""


def labelled(label: str, reads: str = "state_and_change") -> dict[str, Any]:
    return {"model.gate.input": reads, "objective.labelled.label": label}


GATES: dict[str, dict[str, dict[str, Any]]] = {
    "A last": {
        "gate backward": labelled("backward"),
        "gate forward": labelled("forward"),
        "gate accuracy": labelled("accuracy"),
        "gate forward, state only": labelled("forward", "state"),
    },
    "B every": {"gate backward": labelled("backward"), "gate forward": labelled("forward")},
    "C gated .05": {"gate backward": labelled("backward"), "gate forward": labelled("forward")},  # from its own gate
}
"""Gates that are trained on frozen backbones."""

COMPARED = ("A last", "C gated .05")
"""Backbones on which every rule is measured, and every point also with the iterations of other rows."""


def configuration(task: str, seed: int, out: Path, options: dict[str, Any]) -> RunConfig:
    """Return the quickstart's recipe for a task, with gradient through all iterations."""
    options = {
        "data.task.name": task, "seed": seed, "out": out, "steps": STEPS, "model.mean-backprop-depth": "null",
        "checkpoint.every": STEPS, "validation.every": STEPS, "optimizer.cooldown-steps": STEPS // 3, **options,
    }  # fmt: skip
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return parse_options(TrainCommand, ["--config", str(CONFIGS / "shell-game.yaml"), *arguments]).run_config()


def flops(config: RunConfig) -> int:
    """Return the training FLOPs of a run with its own sampled depths."""
    depths = (sample_depth(config.model, seed=config.seed, step=step, micro_step=0) for step in range(config.steps))
    return config.batch_size * sum(
        micro_step_flops(config, tokens(config, step), depth) for step, depth in enumerate(depths)
    )


def backbone(task: str, seed: int, name: str, keep: Path) -> RunConfig:
    """Return the configuration of a backbone."""
    out = keep / f"{task}-{seed}-{name}".replace(" ", "-").replace(",", "")
    config = configuration(task, seed, out, BACKBONES[name])
    if name not in MATCHED:
        return config
    steps = round(STEPS * flops(backbone(task, seed, MATCHED[name], keep)) / flops(config))
    return configuration(task, seed, out, {"steps": steps, "optimizer.cooldown-steps": steps // 3})


def gate(task: str, seed: int, on: RunConfig, name: str, options: dict[str, Any]) -> RunConfig:
    """Return the configuration of a gate for a finished backbone, trained as it is used: from zeros, at every depth."""
    return configuration(task, seed + 1000, Path(f"{on.out}-{name}".replace(" ", "-").replace(",", "")), {
        **options, "init-from": on.out, "trainable": "gate", "steps": GATE_STEPS, "checkpoint.every": GATE_STEPS,
        "model.sampling-scheme": "fixed", "model.mean-recurrence": CAP, "model.state-init": "zero",
        "data.task.curriculum-fraction": 0, "data.task.mixed-lengths": "true", "optimizer.name": "adamw",
        "optimizer.lr": 0.02, "optimizer.cooldown-steps": GATE_STEPS // 2,
    })  # fmt: skip


def run_job(job: tuple[str, int, str], keep: Path) -> dict[str, Any]:
    """Train a backbone and its gates, and measure them."""
    task, seed, name = job
    config = backbone(task, seed, name, keep)
    configs = {label: gate(task, seed, config, label, options) for label, options in GATES.get(name, {}).items()}
    with open(os.devnull, "w") as quiet, redirect_stderr(quiet):  # the progress of training
        model = load_run_model(trained_run(config))
        trained = {label: load_run_model(trained_run(each)).transformer.gate for label, each in configs.items()}
    own = {"own gate": model.transformer.gate} if model.transformer.gate is not None else {}
    gates = own | trained
    began = time.process_time()
    wanted = ALL_RULES if name in COMPARED else ("state-change", "kl")
    found = measure(model, TASKS[task], gates, wanted, anchored=name in COMPARED)
    return {
        "task": task, "seed": seed, "backbone": name, "steps": config.steps, "training_flops": flops(config),
        "training_seconds": sum(read_cost(Path(each.out))[1] for each in (config, *configs.values())),
        "measuring_seconds": time.process_time() - began, **found,
    }  # fmt: skip


def file_name(job: tuple[str, int, str]) -> str:
    return "-".join(map(str, job))


def kept_job(job: tuple[str, int, str], keep: Path) -> dict[str, Any]:
    result: dict[str, Any] = kept(str(keep), file_name(job), partial(run_job, job, keep))
    print(*job, f"{result['training_seconds']:.0f} s + {result['measuring_seconds']:.0f} s", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--backbones", default=";".join(BACKBONES), help="names, between semicolons")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--keep", default="build/stopping", help="folder of runs and finished measurements")
    parser.add_argument("--report", action="store_true", help="write the results of what is finished; train nothing")
    parser.add_argument("--add", action="store_true", help="keep the rows that only results/stopping.json has")
    args = parser.parse_args()
    jobs = [
        (task, int(seed), name)
        for seed in args.seeds.split(",")
        for task in args.tasks.split(",")
        for name in args.backbones.split(";")
    ]
    if args.report:
        jobs = [job for job in jobs if (Path(args.keep) / f"{file_name(job)}.json").is_file()]
    with multiprocessing.get_context("spawn").Pool(args.workers, maxtasksperchild=1) as pool:
        runs = pool.starmap(kept_job, [(job, Path(args.keep)) for job in jobs], chunksize=1)
    payload = summary(runs)
    if args.add:
        payload = with_earlier(payload, read_result("stopping"))
    print(backbone_table(payload), table(payload), contrast_table(payload), sep="\n\n")
    write_result("stopping", payload)
    plot(payload)


if __name__ == "__main__":
    main()
