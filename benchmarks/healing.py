"""Heal a converted SmolLM2-135M on real text, and train the dense model on as a control.

    python -m benchmarks healing [--steps 60] [--keep FOLDER] [--device auto] [--batch 4] [--tokens 256]

Needs `make real`. Prepares build/real/text with the model's tokenizer, converts the model to 10 + 10 + 10 layers, and
trains with the options of configs/finetune/heal-1-text.yaml on a small scale: the recurrent model, the dense model with
the same rows (equal tokens), and the dense model for as many steps as make equal FLOPs. Measures the loss on held-out
rows over core iterations before and after, and the accuracy of the trained models on the first questions of each task
(before: `python -m benchmarks conversion`). Every part is a folder in FOLDER and continues after an interruption. Hours
on a CPU. Writes results/healing.json.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import kept, write_result
from benchmarks.conversion import TASKS, accuracies, load
from recurrent_depth.cli import main as run_command
from recurrent_depth.data.config import DataConfig, PackedDataConfig
from recurrent_depth.data.loader import open_source
from recurrent_depth.devices import choose_device
from recurrent_depth.hf.configuration import RecurrentDepthConfig
from recurrent_depth.model.config import SHAPES
from recurrent_depth.model.flops import mean_training_flops, training_flops
from recurrent_depth.parsing import parse_options
from recurrent_depth.training.config import RunConfig, TrainCommand
from recurrent_depth.training.optimizer import ramped

ROOT = Path(__file__).parents[1]
MODEL, TEXT = ROOT / "build" / "real" / "smollm2-135m", ROOT / "build" / "real" / "text"
CONFIG = ROOT / "configs" / "finetune" / "heal-1-text.yaml"
SOURCES = ("anarchism", "brown", "python-doc")
DEPTHS = (1, 2, 4, 8)
VALIDATION_ROWS = 16
OPTIMIZERS = {"cuda": ("muon", 1e-4), "cpu": ("adamw", 5e-5)}
"""Optimizer and learning rate: orthogonalising 210 matrices takes most of a small training step on a CPU."""


def command(*arguments: object) -> None:
    """Run a verb of the command line."""
    status = run_command([str(argument) for argument in arguments])
    if status:
        raise SystemExit(status)


def recipe(args: argparse.Namespace, data: Path) -> list[str]:
    """Return the options of the recurrent run: the shipped recipe on a small scale."""
    name, lr = OPTIMIZERS["cuda" if choose_device(args.device).type == "cuda" else "cpu"]
    changes = {
        "optimizer.name": name, "optimizer.lr": lr, "data.packed.path": data, "steps": args.steps,
        "batch-size": args.batch, "micro-steps": 1, "log-every": 1,
        "optimizer.warmup-steps": max(1, args.steps // 20), "depth-ramp.steps": args.steps * 3 // 4,
        "checkpoint.every": 10, "validation.rows": VALIDATION_ROWS, "validation.every": args.steps,
        "runtime.device": args.device, "runtime.threads": torch.get_num_threads(),
    }  # fmt: skip
    return ["--config", str(CONFIG), *(part for name, value in changes.items() for part in (f"--{name}", str(value)))]


def dense_flops(tokens: int) -> float:
    """Return the FLOPs of a dense training row: one iteration, without the adapter."""
    shape = SHAPES["smollm2-135m-10-10-10"]
    adapter = 3 * 4 * tokens * shape.n_embd**2 - 2 * tokens * shape.n_embd**2  # the first state needs no gradient
    return training_flops(shape, tokens, 0, 1) - adapter


def equal_flops_steps(config: RunConfig, tokens: int) -> int:
    """Return the dense training steps with the FLOPs of the recurrent run."""
    means = (
        mean_training_flops(ramped(config.model, config.depth_ramp, s), tokens, draws=256) for s in range(config.steps)
    )
    return round(sum(means) / dense_flops(tokens))


@torch.no_grad()
def held_out_loss(model: Any, data: Path, **depth: int) -> float:
    """Return the mean loss per token on held-out rows, each document by itself."""
    packed = PackedDataConfig(str(data), document_masking=True, restart_positions=True)
    source = open_source(DataConfig(packed=packed), "validation", 0, 1)
    total, count = 0.0, 0
    for row in range(VALIDATION_ROWS):
        batch = source.batch(row, 1, 0).to(model.device)
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **depth).logits
        total += F.cross_entropy(logits[0].float(), batch.targets[0], ignore_index=-100, reduction="sum").item()
        count += int((batch.targets != -100).sum())
    return total / count


def is_recurrent(folder: Path) -> bool:
    """Return whether an HF folder holds a recurrent model."""
    return json.loads((folder / "config.json").read_text())["model_type"] == RecurrentDepthConfig.model_type


def losses(folder: Path, data: Path, device: str) -> dict[str, float]:
    """Return the held-out loss of an HF folder, by core iterations if it is recurrent."""
    model = load(folder).to(choose_device(device))
    if is_recurrent(folder):
        return {str(r): held_out_loss(model, data, num_steps=r) for r in DEPTHS}
    return {"dense": held_out_loss(model, data)}


def task_accuracies(folder: Path, name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the accuracy of an HF folder on every task, by core iterations if it is recurrent."""
    recurrent, rows = is_recurrent(folder), []
    for num_steps in DEPTHS if recurrent else (1,):
        for task in TASKS:
            key = f"accuracy {name} {args.steps} r={num_steps} {task} {args.questions}"
            found = kept(args.keep, key, partial(accuracies, folder, num_steps, task, args.questions, args.device))
            rows.append({"model": name, "num_steps": num_steps if recurrent else None, "task": task, **found})
            print(key, found["value"], flush=True)
    return rows


def train_dense(out: Path, run: list[str], steps: int) -> Path:
    if not (out / "model").is_dir():
        scale = ["--run.steps", str(steps), "--run.optimizer.warmup-steps", str(max(1, steps // 20))]
        changes = [f"--run.{part.removeprefix('--')}" if part.startswith("--") else part for part in run[2:]]
        resume = ["--resume", "true"] if out.is_dir() else []
        command("train-dense", "--run", run[1], *changes, *scale, "--model", MODEL, "--out", out, *resume)
    return out / "model"


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="training steps of the recurrent run")
    parser.add_argument("--batch", type=int, default=4, help="rows of a training step")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a row")
    parser.add_argument("--questions", type=int, default=40, help="questions of each task; 0: only the loss")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--keep",
        default="build/healing",
        help="folder of data, runs and finished measurements; one for each size of a row and a batch",
    )
    return parser


def heal(args: argparse.Namespace) -> dict[str, Any]:
    """Run everything that is not kept yet; return the content of the result."""
    root = Path(args.keep)
    data, start, healed = root / "data", root / "converted", root / f"healed-{args.steps}"
    if not data.is_dir():
        sources = ",".join(str(TEXT / name) for name in SOURCES)
        tokenizer = ["--tokenizer", MODEL / "tokenizer.json", "--sequence-length", args.tokens]
        command("prepare", "--source", sources, *tokenizer, "--policy", "best-fit", "--out", data)
    if not start.is_dir():
        command("convert", "--model", MODEL, "--prelude", 10, "--core", 10, "--coda", 10, "--out", start)
    run = recipe(args, data)
    command("train", *run, "--init-from", start, "--out", healed, "--resume", "true")
    config = parse_options(TrainCommand, [*run, "--out", str(healed)]).run_config()
    more = equal_flops_steps(config, args.tokens)
    export = root / f"healed-{args.steps}-export"
    if not export.is_dir():
        command("export", "--model", healed, "--out", export)
    before = {"dense, before": MODEL, "recurrent, before": start}
    trained = {"recurrent, healed": export}
    for name, steps in (("tokens", args.steps), ("FLOPs", more)):
        trained[f"dense, equal {name}"] = train_dense(root / f"dense-{name}-{steps}", run, steps)
    measured = {}
    for name, folder in (before | trained).items():
        measured[name] = kept(args.keep, f"loss {name} {args.steps}", partial(losses, folder, data, args.device))
    for name, by_depth in measured.items():
        print(name, {depth: round(loss, 4) for depth, loss in by_depth.items()}, flush=True)
    rows = []
    for name, folder in trained.items() if args.questions else ():
        rows += task_accuracies(folder, name, args)
    settings = {
        "text": SOURCES, "steps": args.steps, "rows": args.batch, "tokens": args.tokens,
        "optimizer": config.optimizer.name, "trained_tokens": args.steps * args.batch * args.tokens,
        "equal_flops_steps": more, "questions": args.questions,
    }  # fmt: skip
    return settings | {"loss": measured, "accuracy": rows}


def main() -> None:
    write_result("healing", heal(options().parse_args()))


if __name__ == "__main__":
    main()
