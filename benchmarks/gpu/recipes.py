"""Stage `recipes`: whole trainings on the device. The quickstart's must reach the accuracy it has on a CPU.

The second is the recipe of the 100M model (configs/pretrain/100m-one-gpu.yaml) on the source code of Python's standard
library, for the minutes that are left: its loss by iterations, not a model to use.
"""

import dataclasses
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import read_result
from benchmarks.gpu.acceptance import leave_process_group
from benchmarks.gpu.stage import Stage
from recurrent_depth.data.tasks.state import TASKS
from recurrent_depth.evaluation.generated import evaluate_per_position
from recurrent_depth.parsing import parse_options
from recurrent_depth.training.config import RunConfig, TrainCommand
from recurrent_depth.training.health import validate
from recurrent_depth.training.parallel import start_processes
from recurrent_depth.training.trainer import Trainer

CONFIGS = Path(__file__).parents[2] / "configs" / "pretrain"
NUM_STEPS = [1, 4, 8, 12, 16, 32, 64]
TEXT_SECONDS = 20  # of training the 100M model, in bfloat16 and again in float8


def run(stage: Stage) -> None:
    stage.measure("quickstart, shell game", shell_game, stage)
    with tempfile.TemporaryDirectory() as folder:
        for float8 in (False, True):
            name = f"100M model, text, {'float8' if float8 else 'bfloat16'}"
            if not float8 or (find_spec("torchao") and not stage.toy):
                stage.measure(name, text, stage, f"{folder}/data", float8)


def read_config(name: str, *options: str) -> RunConfig:
    """Return the run of a shipped configuration with some options changed."""
    return parse_options(TrainCommand, ["--config", str(CONFIGS / f"{name}.yaml"), *options]).run_config()


def shell_game(stage: Stage) -> dict[str, Any]:
    """Train the quickstart's model; its accuracy from 12 iterations on must be the CPU's within a point."""
    config = read_config("quickstart/shell-game", "--runtime.device", stage.device.type, "--out", "unused")
    if stage.toy:
        config = dataclasses.replace(
            config, steps=3, optimizer=dataclasses.replace(config.optimizer, warmup_steps=1, cooldown_steps=1)
        )
    began = time.perf_counter()
    trainer = Trainer(config, start_processes(config.runtime))
    while trainer.step < config.steps:
        trainer.train_step()
    seconds = time.perf_counter() - began
    leave_process_group()
    depths = NUM_STEPS[:2] if stage.toy else NUM_STEPS
    model = trainer.model.float().eval()
    results = evaluate_per_position(model, "shell-game", TASKS["shell_game"], depths)
    accuracy = {r.num_steps: r.value for r in results if r.difficulty == "all"}
    there = read_result("quickstart_seeds")["summary"]
    cpu = {int(r["num_steps"][1:]): r["mean"] for r in there if r["model"] == "shell-game" and r["difficulty"] == "all"}
    if not stage.toy:
        worst = max(abs(accuracy[r] - cpu[r]) for r in (12, 16, 32, 64))
        assert worst < 0.01, f"accuracy {accuracy}, on a CPU {cpu}"
    return {"training_seconds": seconds, "steps": config.steps, "accuracy": accuracy, "accuracy_on_cpu": cpu}


def text(stage: Stage, data: str, float8: bool) -> dict[str, Any]:
    """Train the 100M recipe for a fixed time, on a schedule for the steps that fit into it; return its loss."""
    if not Path(data).is_dir():
        length = "32" if stage.toy else "1024"
        command = ["prepare", "--source", "python-stdlib", "--sequence-length", length, "--out", data]
        command += ["--vocab-size", "512"] if stage.toy else []
        subprocess.run([sys.executable, "-m", "recurrent_depth.cli", *command], check=True)
    options = ["--out", "unused", "--micro-steps", "4", "--runtime.float8", str(float8).lower()]
    config = read_config("100m-one-gpu", "--data.packed.path", data, *options)
    if stage.toy:
        model = read_config("quickstart/text").model
        runtime = dataclasses.replace(config.runtime, device="cpu", compile=False)
        config = dataclasses.replace(config, model=model, batch_size=4, runtime=runtime)
    ranks = start_processes(config.runtime)
    trainer = Trainer(config, ranks)
    times = []
    for _ in range(2 if stage.toy else 6):
        began = time.perf_counter()
        trainer.train_step()
        times.append(time.perf_counter() - began)
    steps = 2 if stage.toy else max(20, int(TEXT_SECONDS / min(times)))
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=steps // 10, cooldown_steps=steps // 4)
    trainer.config = dataclasses.replace(config, steps=steps, optimizer=optimizer)
    losses, tokens, flops, began, end = [], 0.0, 0.0, time.perf_counter(), stage.end
    trainer.step = 0
    while trainer.step < steps and time.monotonic() < end:
        record = trainer.train_step()
        losses.append(record["loss"])
        tokens, flops = tokens + record["tokens"], flops + record["flops"]
    seconds = time.perf_counter() - began
    validation = dataclasses.replace(config.validation, rows=8 if stage.toy else 64, num_steps=(1, 4, 8, 16, 32, 64))
    found = validate(trainer.model, trainer.validation_source, validation, trainer.rows, ranks)
    leave_process_group()
    return {
        "parameters": trainer.model.num_parameters, "steps": trainer.step, "training_seconds": seconds,
        "tokens": tokens, "tokens_per_second": tokens / seconds, "executed_flops_per_second": flops / seconds,
        "first_loss": losses[0], "last_losses": losses[-5:], "validation": found,
        "peak_memory_bytes": None if stage.toy else torch.cuda.max_memory_allocated(),
    }  # fmt: skip
