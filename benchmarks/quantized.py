"""Accuracy of the quickstart's model with quantised weights, by bits and core iterations.

    python -m benchmarks quantized [--models RUN RUN ...]

Without --models the quickstart's shell game is trained with seeds 0 to 2. torchao rounds the weights of all linear
layers below the head: int8 by output channel (as `--quantize int8`), int4, int3 and int2 by groups of 16. Held-out
shell games, all positions in parallel. Speed is in
benchmarks/generate.py. Writes results/quantized.json.
"""

import argparse
import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torchao
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

from benchmarks.common import trained_run, write_result
from recurrent_depth.data.tasks.state import TASKS
from recurrent_depth.evaluation.generated import VALIDATION_SPLIT
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.parsing import parse_options
from recurrent_depth.runs import load_run_model
from recurrent_depth.training.config import TrainCommand

CONFIGS = Path(__file__).parents[1] / "configs" / "pretrain" / "quickstart"
DEPTHS = (1, 2, 4, 8, 12, 16, 32, 64)
LENGTH, ROWS = 16, 512
SCHEMES: dict[str, Any] = {"float32": None, "int8": Int8WeightOnlyConfig()} | {
    f"int{bits}": IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(16))
    for bits in (4, 3, 2)
}


def trained(seed: int) -> RecurrentDepthModel:
    with tempfile.TemporaryDirectory() as scratch:
        arguments = ["--config", str(CONFIGS / "shell-game.yaml"), "--seed", str(seed), "--out", f"{scratch}/run"]
        return load_run_model(trained_run(parse_options(TrainCommand, arguments).run_config()))


@torch.inference_mode()
def accuracy(model: RecurrentDepthModel, num_steps: int) -> float:
    """Return the share of positions after a swap at which the ball is found."""
    ids, labels = TASKS["shell_game"].rows(0, ROWS, LENGTH, seed=0, split=VALIDATION_SPLIT)
    correct = model(ids, num_steps=num_steps).logits.argmax(-1) == labels
    return correct[:, 1 : LENGTH + 1].double().mean().item()


def measure(model: RecurrentDepthModel, scheme: str) -> list[dict[str, Any]]:
    model = copy.deepcopy(model).eval()
    if SCHEMES[scheme] is not None:
        quantize_(model.transformer, SCHEMES[scheme])
    return [{"weights": scheme, "num_steps": r, "accuracy": accuracy(model, r)} for r in DEPTHS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="run folders, one per seed; default: train seeds 0, 1, 2")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torchao")
    rows: list[dict[str, Any]] = []
    for seed in range(len(args.models) if args.models else 3):
        model = load_run_model(args.models[seed]) if args.models else trained(seed)
        for scheme in SCHEMES:
            found = measure(model, scheme)
            rows += [{"model": args.models[seed] if args.models else f"seed {seed}", **row} for row in found]
            values = " | ".join(f"{100 * row['accuracy']:.2f}" for row in found)
            print(f"| {rows[-1]['model']} | {scheme} | {values} |", flush=True)
    settings = {"torchao": torchao.__version__, "games": ROWS, "swaps": LENGTH, "group": 16}
    write_result("quantized", settings | {"rows": rows})


if __name__ == "__main__":
    main()
