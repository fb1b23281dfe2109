"""Conversion in small: dense models trained on the shell game become recurrent and train on.

    python -m benchmarks conversion_study [--seeds 3] [--keep FOLDER]

Per seed: a dense model of 8 layers (Llama architecture) trains on the shell game. Then it is converted to 2 + 4 + 2
layers with each initial adapter and trains on, with the depth ramp of the healing recipe; the dense model trains on
the same rows for as many steps (equal tokens), and for as many steps as make equal FLOPs. All runs have the same
optimizer and schedule. Writes results/conversion_study.json.
"""

import argparse
import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import kept, write_result
from recurrent_depth.data.tasks.state import TASKS, TRAINING_SPLIT, VALIDATION_SPLIT
from recurrent_depth.hf.configuration import RecurrentDepthConfig
from recurrent_depth.hf.conversion.command import RETROFIT_STATE_STD, initial_adapter, load_exactly
from recurrent_depth.hf.conversion.dense import converted_weights, model_config
from recurrent_depth.hf.modeling import RecurrentDepthForCausalLM
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.flops import mean_training_flops, training_flops
from recurrent_depth.model.recurrence import sample_depth
from recurrent_depth.training.config import DepthRampConfig, OptimizerConfig
from recurrent_depth.training.optimizer import build_optimizer, clip_gradients, learning_rate, ramped, set_learning_rate

TASK = TASKS["shell_game"]
SPLIT = (2, 4, 2)
BATCH, LENGTH, TESTED, ROWS = 64, 16, (16, 24), 512
BEFORE, AFTER, MEAN = 1500, 1000, 6
"""Training steps of the dense model, and after the conversion; mean recurrence."""

OPTIMIZER = OptimizerConfig(name="adamw", lr=2e-3, weight_decay=0.0, warmup_steps=50, schedule="cosine", final_lr=0.01)
RAMP = DepthRampConfig(start=1, steps=AFTER * 3 // 4, shape="one_minus_sqrt", backprop=True)
DEPTHS = (1, 2, 4, 6, 8, 12, 16)
INITS = ("identity", "input_only", "random")


def dense_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TASK.vocabulary), hidden_size=64, intermediate_size=176, num_hidden_layers=sum(SPLIT),
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def shape(dense: LlamaForCausalLM, init: str) -> ModelConfig:
    return model_config(
        dense.config, SPLIT, tie_embeddings=False, mean_recurrence=MEAN, mean_backprop_depth=8,
        state_init="like-init" if init == "random" else "zero", initial_state_std=RETROFIT_STATE_STD,
    )  # fmt: skip


def converted(dense: LlamaForCausalLM, init: str, seed: int) -> RecurrentDepthForCausalLM:
    config = shape(dense, init)
    model = RecurrentDepthForCausalLM(RecurrentDepthConfig.from_model_config(config))
    weights = converted_weights(dense, config, range(sum(SPLIT)))
    load_exactly(model, weights | {"transformer.adapter.weight": initial_adapter(init, config.n_embd, seed)})
    return model


def train(model: Any, first_step: int, steps: int, seed: int) -> None:
    """Train on rows from `first_step` on. A recurrent model samples its depth; a ramp raises the mean."""
    optimizer = build_optimizer(model, OPTIMIZER)
    parameters = list(model.parameters())
    for step in range(steps):
        set_learning_rate(optimizer, learning_rate(OPTIMIZER, step, steps))
        ids, labels = TASK.rows((first_step + step) * BATCH, BATCH, LENGTH, seed=seed, split=TRAINING_SPLIT)
        depth = {}
        if isinstance(model, RecurrentDepthForCausalLM):
            now = ramped(model.model_config, RAMP, step)
            depth = {"num_steps": sample_depth(now, seed=seed, step=step, micro_step=0)}
        logits = model.train()(input_ids=ids, **depth).logits
        F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
        clip_gradients(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def accuracy(model: Any, length: int, seed: int, **depth: int) -> float:
    """Return the share of positions after a swap at which the ball is found, on held-out rows."""
    ids, labels = TASK.rows(0, ROWS, length, seed=seed, split=VALIDATION_SPLIT)
    right: Tensor = model.eval()(input_ids=ids, **depth).logits.argmax(-1) == labels
    return right[:, 1 : length + 1].double().mean().item()


def tested(model: Any, name: str, seed: int, steps: int) -> list[dict[str, Any]]:
    depths = [{"num_steps": r} for r in DEPTHS] if isinstance(model, RecurrentDepthForCausalLM) else [{}]
    common = {"model": name, "seed": seed, "steps": steps}
    return [
        common | {"length": length, **depth, "value": accuracy(model, length, seed, **depth)}
        for length in TESTED
        for depth in depths
    ]


def flops_ratio(dense: LlamaForCausalLM) -> float:
    """Return the mean FLOPs of a recurrent training step, over the steps, relative to a dense one."""
    config = shape(dense, "identity")
    means = [mean_training_flops(ramped(config, RAMP, step), LENGTH, draws=256) for step in range(0, AFTER, 50)]
    adapter = 3 * 4 * LENGTH * config.n_embd**2 - 2 * LENGTH * config.n_embd**2  # no gradient of the first state
    once = training_flops(config, LENGTH, 0, 1) - adapter
    return sum(means) / len(means) / once


def study(seed: int) -> dict[str, Any]:
    dense = dense_model(seed)
    train(dense, 0, BEFORE, seed)
    rows = tested(dense, "dense", seed, BEFORE)
    more = round(AFTER * flops_ratio(dense))
    for name, steps in (("dense, equal tokens", AFTER), ("dense, equal FLOPs", more)):
        control = copy.deepcopy(dense)
        train(control, BEFORE, steps, seed)
        rows += tested(control, name, seed, BEFORE + steps)
    for init in INITS:
        model = converted(dense, init, seed)
        rows += tested(model, f"{init}, before", seed, BEFORE)
        train(model, BEFORE, AFTER, seed)
        rows += tested(model, init, seed, BEFORE + AFTER)
    return {"rows": rows, "equal_flops_steps": more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", default="build/conversion-study", help="folder of finished seeds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = [kept(args.keep, f"seed-{seed}", lambda s=seed: study(s)) for seed in range(args.seeds)]
    for row in (row for result in found for row in result["rows"] if row["length"] == LENGTH):
        print(row["model"], row["seed"], row.get("num_steps", ""), f"{100 * row['value']:.1f}", flush=True)
    settings = {
        "task": TASK.name, "layers": SPLIT, "width": 64, "batch": BATCH, "length": LENGTH, "steps_before": BEFORE,
        "steps_after": AFTER, "mean_recurrence": MEAN, "equal_flops_steps": [r["equal_flops_steps"] for r in found],
        "parameters": {"dense": sum(p.numel() for p in dense_model(0).parameters())},
    }  # fmt: skip
    write_result("conversion_study", settings | {"rows": [row for result in found for row in result["rows"]]})


if __name__ == "__main__":
    main()
