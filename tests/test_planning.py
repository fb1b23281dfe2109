"""The plan against what a real forward pass keeps, and the table in the documentation."""

from pathlib import Path

import pytest
import torch

from recurrent_depth.model.config import SHAPES, ModelConfig
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.planning.activations import activation_bytes
from recurrent_depth.planning.config import PlanConfig
from recurrent_depth.planning.finetuning import finetuning_bytes, finetuning_table, lora_parameters

CONFIG = ModelConfig(n_embd=128, n_heads=4, intermediate_size=352, vocab_size=1024, n_layers_in_recurrent_block=2)


def really_kept(steps, checkpointing, batch=2, tokens=64):
    """Bytes of distinct storages that autograd keeps when the model really runs, without the head."""
    model = RecurrentDepthModel(CONFIG)
    model.transformer.core_block.activation_checkpointing = checkpointing
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    model.lm_head = torch.nn.Identity()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.zeros(batch, tokens, dtype=torch.long), num_steps=steps)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("checkpointing", ["none", "step", "block"])
@pytest.mark.parametrize("steps", [(0, 1), (5, 3)])
def test_planned_activations_are_those_that_are_kept(steps, checkpointing):
    planned = activation_bytes(CONFIG, 2, 64, steps, checkpointing, torch.float32)
    assert planned == pytest.approx(really_kept(steps, checkpointing), rel=0.02)


@pytest.mark.parametrize("checkpointing", ["none", "step", "block"])
def test_every_step_with_gradient_keeps_the_same(checkpointing):
    one, two, seven = (activation_bytes(CONFIG, 2, 64, (0, k), checkpointing) for k in (1, 2, 7))
    assert seven == one + 6 * (two - one)


def test_weights_and_lora_are_counted_as_they_are():
    from peft import LoraConfig, get_peft_model

    from recurrent_depth.hf.loading import wrap

    targets = ["adapter", "Wqkv", "fc", "proj"]
    tuned = get_peft_model(wrap(RecurrentDepthModel(CONFIG)), LoraConfig(r=4, target_modules=targets))
    assert lora_parameters(CONFIG, 4) == sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    parts = finetuning_bytes(SHAPES["huginn-3.5b"], "full-fp32", 512)
    assert parts["weights"] == 6 * 3_564_976_800
    assert parts["optimizer"] == 8 * 3_564_976_800


def test_the_documented_table_is_the_computed_one():
    guide = (Path(__file__).parents[1] / "docs" / "huggingface.md").read_text()
    assert finetuning_table(PlanConfig().finetuning) in guide
