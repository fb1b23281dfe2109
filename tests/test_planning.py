"""Planned memory of fine-tuning against a real forward pass, and the table in the documentation."""

import gc
from pathlib import Path

import pytest
import torch

from live_memory import LiveMemory
from recurrent_depth.model.config import SHAPES, ModelConfig
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.planning.activations import activation_bytes
from recurrent_depth.planning.config import PlanConfig
from recurrent_depth.planning.finetuning import finetuning_bytes, finetuning_table, lora_parameters

CONFIG = ModelConfig(n_embd=128, n_heads=4, intermediate_size=352, vocab_size=1024, n_layers_in_recurrent_block=2)


def bytes_alive_for_backward(steps, checkpointing, batch=2, tokens=64):
    """Return the bytes of storages that the graph keeps alive after a real forward pass, without the head.

    They are counted from the storages that operations allocate, not from the autograd hooks that the plan uses.
    """
    model = RecurrentDepthModel(CONFIG)
    model.transformer.core_block.activation_checkpointing = checkpointing
    model.lm_head = torch.nn.Identity()
    ids = torch.zeros(batch, tokens, dtype=torch.long)
    with LiveMemory() as live:
        graph = model(ids, num_steps=steps).logits.grad_fn
    gc.collect()
    alive = live.current()
    del graph
    gc.collect()
    return alive - live.current()


@pytest.mark.parametrize("checkpointing", ["none", "step", "block"])
@pytest.mark.parametrize("steps", [(0, 1), (5, 3)])
def test_planned_activations_are_the_bytes_that_stay_alive(steps, checkpointing):
    planned = activation_bytes(CONFIG, 2, 64, steps, checkpointing, torch.float32)
    assert planned == pytest.approx(bytes_alive_for_backward(steps, checkpointing), rel=0.02)


@pytest.mark.parametrize("checkpointing", ["none", "step", "block"])
def test_planned_activations_grow_linearly_with_iterations(checkpointing):
    one, two, seven = (activation_bytes(CONFIG, 2, 64, (0, k), checkpointing) for k in (1, 2, 7))
    assert seven == one + 6 * (two - one)


def test_planned_weights_and_lora_equal_the_real_parameters():
    from peft import LoraConfig, get_peft_model

    from recurrent_depth.hf.loading import wrap

    targets = ["adapter", "Wqkv", "fc", "proj"]
    tuned = get_peft_model(wrap(RecurrentDepthModel(CONFIG)), LoraConfig(r=4, target_modules=targets))
    assert lora_parameters(CONFIG, 4) == sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    parts = finetuning_bytes(SHAPES["huginn-3.5b"], "full-fp32", 512)
    assert parts["weights"] == 6 * 3_564_976_800
    assert parts["optimizer"] == 8 * 3_564_976_800


def test_documented_finetuning_table_equals_the_computed_one():
    guide = (Path(__file__).parents[1] / "docs" / "finetuning.md").read_text()
    assert finetuning_table(PlanConfig().finetuning) in guide
