"""Which reasoning tasks in words need depth? One model of 1M parameters on a mixture of reasoning-gym tasks.

    pip install reasoning-gym==0.1.25
    python -m benchmarks reasoning_words [--seeds 0,1,2] [--steps 1400] [--keep FOLDER]

Examples are a question and its answer in words, as the package writes them, with a tokenizer trained on them. Three
models see the same rows: the recurrent one; one of the same layers, each run once, trained for as many steps ("equal
parameters"); and one of as many different layers as the recurrent one runs on average, trained with its FLOPs ("equal
FLOPs"). lm-eval generates answers to held-out questions, graded by the package. Data, runs (from their
checkpoints) and measurements are kept in FOLDER, and the same command continues after an interruption. About half an
hour of CPU for each model; --device cuda trains on a GPU. --models and --seeds share the work between processes;
with all models and several seeds it writes results/reasoning_words.json and .png.

--trial is the recurrent model alone on more tasks, to see which can be learned (--steps 500 --batch-size 16). Writes
results/reasoning_words_trial.json. --rates trains every model with other learning rates, one seed. Writes
results/reasoning_words_rates.json.
"""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.common import interval, kept, trained_run, write_result
from benchmarks.reasoning_words_report import plot
from benchmarks.reasoning_words_tasks import HELD_OUT, LONGEST, PREFIX, TASKS, TRIED, VOCABULARY, Options, prepare
from recurrent_depth.data.config import DataConfig, PackedDataConfig
from recurrent_depth.evaluation.command import evaluate
from recurrent_depth.evaluation.config import EvalConfig, LmEvalConfig
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.flops import mean_training_flops
from recurrent_depth.quickstart import read_cost
from recurrent_depth.runs import load_run_model
from recurrent_depth.training.config import (
    CheckpointConfig,
    OptimizerConfig,
    RunConfig,
    RuntimeConfig,
    ValidationConfig,
)

DEPTHS = (1, 2, 4, 8, 16, 32, 64)
READ_AT = "8"  # the mean number of iterations in training is 9
FEWSHOT_TASK, FEWSHOT, FEWSHOT_DEPTHS = "chain_sum", (1, 2, 4), (1, 2, 4, 8, 16, 32)

SHAPE = ModelConfig(
    n_embd=128, n_heads=4, intermediate_size=384, n_layers_in_recurrent_block=2, vocab_size=VOCABULARY, block_size=512,
    mean_recurrence=8, mean_backprop_depth=4,
)  # fmt: skip
_ONCE: dict[str, Any] = {
    "mean_recurrence": 1, "mean_backprop_depth": None, "sampling_scheme": "fixed", "state_init": "zero",
}  # fmt: skip
SHAPES = {
    "recurrent": SHAPE,
    "equal parameters": dataclasses.replace(SHAPE, **_ONCE),
    "equal FLOPs": dataclasses.replace(SHAPE, **_ONCE, n_layers_in_recurrent_block=2 * (SHAPE.mean_recurrence + 1)),
}
"""The drawn depths have a mean of `mean_recurrence` + 1."""

LEARNING_RATE = {"recurrent": 5e-3, "equal parameters": 5e-3, "equal FLOPs": 2e-3}
OTHER_RATES = {"recurrent": (2e-3, 1e-2), "equal parameters": (2e-3, 1e-2), "equal FLOPs": (1e-3, 5e-3)}
"""The neighbours of each rate among 1e-3, 2e-3, 5e-3 and 1e-2, for --rates."""


@dataclasses.dataclass(frozen=True)
class Study:
    """What the models of a study share: tasks with their options, training steps and rows, folder, device."""

    tasks: Options
    steps: int  # of the recurrent model
    batch_size: int
    root: Path
    device: Literal["cpu", "cuda"]

    def steps_of(self, model: str) -> int:
        """Return the training steps of a model."""
        if model != "equal FLOPs":
            return self.steps
        return round(self.steps * mean_training_flops(SHAPE, LONGEST) / mean_training_flops(SHAPES[model], LONGEST))

    def run_config(self, model: str, seed: int, lr: float | None = None) -> RunConfig:
        """Return the configuration of a run, by default with the model's learning rate."""
        steps = self.steps_of(model)
        name = f"{model}-{steps}-{seed}{'' if lr is None else f'-lr-{lr}'}".replace(" ", "-")
        return RunConfig(
            out=str(self.root / name), data=DataConfig(packed=PackedDataConfig(str(self.root / "data"))),
            model=SHAPES[model], steps=steps, batch_size=self.batch_size, seed=seed, log_every=50, trackers=(),
            optimizer=OptimizerConfig(
                name="muon", lr=lr or LEARNING_RATE[model], weight_decay=0.0, warmup_steps=min(100, steps // 10),
                cooldown_steps=steps // 2,
            ),
            runtime=RuntimeConfig(device=self.device, threads=1),
            checkpoint=CheckpointConfig(every=250),
            validation=ValidationConfig(every=500, rows=32, num_steps=(1, 8)),
        )  # fmt: skip


def accuracy(run: Path, tasks: Sequence[str], depths: Sequence[int], shots: int) -> dict[str, dict[str, float]]:
    """Return the share of right answers of lm-eval's generation, by task and number of core iterations."""
    options = LmEvalConfig(include_path=str(run.parent / "data" / "tasks"), batch_size=50, num_fewshot=shots)
    results = evaluate(EvalConfig(
        model=str(run), out=str(run / f"eval-{shots}-{min(depths)}"), num_steps=list(depths),
        tasks=[PREFIX + task for task in tasks], lm_eval=options, overwrite=True,
    ))  # fmt: skip
    found: dict[str, dict[str, float]] = {task: {} for task in tasks}
    for result in results:
        if result.metric == "right":
            found[result.task.removeprefix(PREFIX)][str(result.num_steps)] = result.value
    return found


def depth_needed(results: list[dict[str, Any]], task: str, commonest: float) -> dict[str, Any]:
    """Return the mean accuracies of a task, the first r within two points of the best, and differences at r = 8.

    A task counts as learned if the best is above the share of the most common answer by more than three standard errors
    of one seed: all seeds answer the same questions. Differences are paired by seed.
    """
    by_model: dict[str, list[dict[str, float]]] = {}
    for run in results:
        by_model.setdefault(run["model"], []).append(run["accuracy"][task])
    seeds = by_model.pop("recurrent")
    by_depth = {r: fmean(accuracy[r] for accuracy in seeds) for r in seeds[0]}
    best = max(by_depth.values())
    error = (best * (1 - best) / HELD_OUT) ** 0.5
    learned = best > commonest + 3 * error
    others = {"r = 1": seeds, **by_model}
    return {
        "accuracy": by_depth, "commonest_answer": commonest, "learned": learned,
        "saturates_at": min(int(r) for r, value in by_depth.items() if value >= best - 0.02) if learned else None,
        **{model: fmean(accuracy["1"] for accuracy in found) for model, found in by_model.items()},
        "differences": {
            name: difference([one[READ_AT] - two["1"] for one, two in zip(seeds, found, strict=True)])
            for name, found in others.items()
        },
    }  # fmt: skip


def difference(by_seed: list[float]) -> dict[str, Any]:
    """Return the mean of the differences by seed, and its 95% interval if there are several."""
    return {"mean": fmean(by_seed), "interval_95": interval(by_seed) if len(by_seed) > 1 else None}


def measure(study: Study, model: str, seed: int) -> dict[str, Any]:
    """Train a model and return its accuracies, and those of the recurrent one with examples in the prompt."""
    steps, root, tasks = study.steps_of(model), study.root, list(study.tasks)
    run = trained_run(study.run_config(model, seed))
    depths = DEPTHS if model == "recurrent" else (1,)
    result: dict[str, Any] = {
        "model": model, "seed": seed, "steps": steps, "parameters": load_run_model(run).num_parameters,
        "training_flops": steps * study.batch_size * mean_training_flops(SHAPES[model], LONGEST),
        "training_seconds": read_cost(run)[1],
        "accuracy": kept(str(root), f"{run.name}-accuracy", partial(accuracy, run, tasks, depths, 0)),
    }  # fmt: skip
    if model == "recurrent":
        result["fewshot"] = {
            str(shots): kept(
                str(root), f"{run.name}-{shots}-shots", partial(accuracy, run, [FEWSHOT_TASK], FEWSHOT_DEPTHS, shots)
            )[FEWSHOT_TASK]
            for shots in FEWSHOT
        }
    return result


def measure_rates(study: Study, model: str, seed: int) -> list[dict[str, Any]]:
    """Train a model with other learning rates and return its accuracies at r = 8, or at r = 1 if it has no loop."""
    results = []
    for lr in OTHER_RATES[model]:
        run = trained_run(study.run_config(model, seed, lr))
        depth = int(READ_AT) if model == "recurrent" else 1
        found = kept(str(study.root), f"{run.name}-accuracy", partial(accuracy, run, list(study.tasks), (depth,), 0))
        results.append({
            "model": model, "lr": lr, "seed": seed, "steps": study.steps_of(model),
            "training_seconds": read_cost(run)[1], "accuracy": found,
        })  # fmt: skip
        show(results[-1])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=1400, help="training steps of the recurrent model")
    parser.add_argument("--batch-size", type=int, default=8, help=f"rows of {LONGEST} tokens per training step")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where models are trained")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--trial", action="store_true", help="the recurrent model of the first seed, on more tasks")
    kind.add_argument("--rates", action="store_true", help="other learning rates, with the first seed")
    parser.add_argument("--keep", default="build/reasoning-words", help="folder of data, runs and measurements")
    options = parser.parse_args()
    models, seeds = options.models.split(","), [int(seed) for seed in options.seeds.split(",")]
    if options.trial:
        models, seeds = ["recurrent"], seeds[:1]
    tasks, root = TRIED if options.trial else TASKS, Path(options.keep)
    root = root / f"{'trial' if options.trial else 'study'}-{options.batch_size}"
    study = Study(tasks, options.steps, options.batch_size, root, options.device)
    counts = prepare(root / "data", tasks)
    if options.rates:
        found = [run for name in models for run in measure_rates(study, name, seeds[0])]
        if models == list(SHAPES):
            payload = {"batch_size": study.batch_size, "study_rates": LEARNING_RATE, "runs": found}
            write_result("reasoning_words_rates", payload)
        return
    results = []
    for seed in seeds:
        for name in models:
            results.append(measure(study, name, seed))
            show(results[-1])
    if options.trial or (models == list(SHAPES) and len(seeds) > 1):
        needs = {task: depth_needed(results, task, counts[task]["commonest_answer"]) for task in tasks}
        result = {"tasks": tasks, "batch_size": study.batch_size, "examples": counts, "needs": needs, "runs": results}
        write_result("reasoning_words_trial" if options.trial else "reasoning_words", result)
        if not options.trial:
            plot(result)


def show(result: dict[str, Any]) -> None:
    """Print the accuracy by task and number of core iterations."""
    print(f"{result['model']}, seed {result['seed']}, {result['steps']} training steps")
    for task, by_depth in result["accuracy"].items():
        cells = " ".join(f"{100 * value:5.1f}" for value in by_depth.values())
        print(f"  {task:<22} {cells}", flush=True)
    for shots, by_depth in result.get("fewshot", {}).items():
        print(f"  {FEWSHOT_TASK}, {shots} shots   ", " ".join(f"{100 * value:5.1f}" for value in by_depth.values()))


if __name__ == "__main__":
    main()
