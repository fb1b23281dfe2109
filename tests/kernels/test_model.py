"""A model with kernels equals the model without: logits and gradients of the reference, eager and compiled."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.ops import choose_ops, use_ops
from recurrent_depth.model.recurrence import random_state
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth_kernels.launch import watched
from support import LLAMA_LIKE, lively_model

FIXTURE = Path(__file__).parents[1] / "fixtures" / "huginn_tiny"


@pytest.fixture(scope="module")
def vectors():
    return load_file(FIXTURE / "expected.safetensors")


def build(device, kernels, dtype=torch.float32):
    raw = json.loads((FIXTURE / "config.json").read_text())
    fields = {f.name for f in dataclasses.fields(ModelConfig)} - {"state_init"}
    model = RecurrentDepthModel(ModelConfig(**{key: value for key, value in raw.items() if key in fields}))
    model.load_state_dict(load_file(FIXTURE / "model.safetensors"), strict=False)
    table = model.freqs_cis
    model = model.to(device, dtype)
    model.freqs_cis = table.to(device)
    use_ops(model, choose_ops(kernels, torch.device(device)))
    return model


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def blocks(model):
    parts = model.transformer
    return [*parts.prelude, *parts.core_block, *parts.coda]


@pytest.mark.parametrize("backend", [None, "inductor"])
def test_model_with_kernels_equals_the_reference(vectors, device, backend):
    model = build(device, "triton")
    if backend is not None:
        torch._dynamo.reset()
        for block in blocks(model):
            block.compile(backend=backend, fullgraph=True)
    ids, state = (vectors[name].to(device) for name in ("input_ids", "input_states"))
    out = model(ids, num_steps=(2, 2), input_states=state, labels=ids)
    close(out.loss, vectors["loss_n2_k2"].to(device))
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for key, expected in vectors.items():
        if key.startswith("grad_n2_k2."):
            close(gradients[key.removeprefix("grad_n2_k2.")], expected.to(device))
    if backend is None:
        with torch.no_grad():
            close(model(ids, num_steps=2, input_states=state).logits, vectors["logits_s2"].to(device))


def test_gradients_with_kernels_equal_torch(vectors, device):
    ids = vectors["input_ids"][:1, :7].to(device)
    plain, fused = build(device, "torch"), build(device, "triton")
    for model in (plain, fused):
        model(ids, num_steps=(0, 2), labels=ids).loss.backward()
    wanted = dict(plain.named_parameters())
    for name, p in fused.named_parameters():
        close(p.grad, wanted[name].grad)


@pytest.mark.parametrize("block", ["pre", "branch"])
def test_gradients_of_a_llama_like_model_with_kernels_equal_torch(device, block):
    ids = torch.arange(14, device=device).view(2, 7)
    models = [lively_model(**LLAMA_LIKE | {"block": block}).float().to(device) for _ in range(2)]
    for model, kernels in zip(models, ("torch", "triton"), strict=True):
        use_ops(model, choose_ops(kernels, torch.device(device)))
        model(ids, num_steps=(1, 2), labels=ids).loss.backward()
    wanted = dict(models[0].named_parameters())
    for name, p in models[1].named_parameters():
        close(p.grad, wanted[name].grad, 1e-4)


def test_bfloat16_error_with_kernels_is_not_larger(vectors, device):
    ids = vectors["input_ids"][:1].to(device)
    exact = build(device, "torch", torch.float64)(ids, num_steps=2).logits
    errors = {}
    for kernels in ("torch", "triton"):
        logits = build(device, kernels, torch.bfloat16)(ids, num_steps=2).logits
        errors[kernels] = (logits.double() - exact).norm() / exact.norm()
    assert errors["triton"] < max(1.5 * errors["torch"], 0.01)


def test_core_iteration_has_the_expected_launches(vectors, device):
    """Six kernels per block in the forward pass, and as many in the backward pass."""
    model = build(device, "triton")
    ids = vectors["input_ids"][:1, :4].to(device)
    depth = len(model.transformer.core_block)

    def launches(num_steps):
        with watched() as seen:
            loss = model(ids, num_steps=num_steps, labels=ids).loss
            forward = Counter(launch.name for launch in seen)
            seen.clear()
            loss.backward()
            return forward, Counter(launch.name for launch in seen)

    one, two = launches(1), launches(2)
    assert two[0] - one[0] == {"norm_forward": 4 * depth, "rope_forward": depth, "swiglu_forward": depth}
    assert two[1] - one[1] == {"norm_backward": 4 * depth, "rope_backward": depth, "swiglu_backward": depth}


def test_flop_counter_counts_the_same_products_with_kernels(vectors, device):
    ids = vectors["input_ids"][:1, :4].to(device)
    counts = []
    for kernels in ("torch", "triton"):
        model = build(device, kernels)
        with FlopCounterMode(display=False) as counter:
            model(ids, num_steps=1, labels=ids).loss.backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_checkpointed_iterations_with_kernels_give_the_same_gradients(vectors, device):
    ids = vectors["input_ids"][:1, :4].to(device)
    gradients = []
    for checkpointing in ("none", "block"):
        model = build(device, "triton")
        model.transformer.core_block.activation_checkpointing = checkpointing
        model(ids, num_steps=2, labels=ids).loss.backward()
        gradients.append(model.transformer.adapter.weight.grad)
    assert torch.equal(*gradients)


def test_random_state_is_computed_by_the_kernel(device):
    config = ModelConfig(n_embd=48, n_heads=3)
    rows, positions = torch.arange(2, device=device), torch.arange(5, device=device)[None]
    with watched() as seen:
        drawn = random_state(config, rows, positions, seed=3, step=4, ops=choose_ops("triton", torch.device(device)))
    assert [launch.name for launch in seen] == ["normal_noise"]
    assert (drawn - random_state(config, rows, positions, seed=3, step=4)).abs().max() < (
        1e-6 if device == "cpu" else 4e-6
    )
