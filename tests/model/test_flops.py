"""FLOPs in closed form against torch's counter."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from recurrent_depth.model.config import SHAPES, ModelConfig
from recurrent_depth.model.flops import PEAK_FLOPS, forward_flops, mean_training_flops, peak_of, training_flops
from recurrent_depth.model.transformer import RecurrentDepthModel

CONFIG = ModelConfig(
    n_embd=48, n_heads=3, intermediate_size=80, n_layers_in_prelude=2, n_layers_in_recurrent_block=3, vocab_size=96
)
B, T = 2, 16


@pytest.fixture
def model():
    model = RecurrentDepthModel(CONFIG)
    model.initialise(0)
    return model


def counted(action):
    """Return the FLOPs that torch counts. It does not count flash attention on a CPU, so attention runs as products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        action()
    return counter.get_total_flops()


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_forward_flops_equal_the_torch_counter(model, num_steps):
    ids = torch.randint(0, 96, (B, T))
    with torch.no_grad():
        total = counted(lambda: model(ids, num_steps=num_steps))
    assert total == B * forward_flops(CONFIG, T, num_steps, causal=False)


@pytest.mark.parametrize(("n", "k"), [(0, 1), (0, 3), (4, 2)])
@pytest.mark.parametrize("recompute", ["none", "step", "block"])
def test_training_flops_equal_the_torch_counter(model, n, k, recompute):
    model.transformer.core_block.activation_checkpointing = recompute
    ids = torch.randint(0, 96, (B, T))
    states = torch.randn(B, T, CONFIG.n_embd)
    total = counted(lambda: model(ids, targets=ids, num_steps=(n, k), input_states=states).loss.backward())
    assert total == B * training_flops(CONFIG, T, n, k, recompute, causal=False)


def test_causal_attention_has_about_half_the_flops():
    full = forward_flops(CONFIG, 1024, 4, causal=False)
    half = forward_flops(CONFIG, 1024, 4, causal=True)
    attention = 4 * 1024**2 * CONFIG.n_embd * CONFIG.unrolled_layers(4)
    assert full - half == pytest.approx(attention / 2, rel=2e-3)


def test_huginn_flops_at_its_training_depth_are_the_expected_ones():
    """14.1 TFLOP per core iteration of 4096 tokens, about 840 TFLOP per sample at r = 32, k = 8 with recomputation."""
    config = SHAPES["huginn-3.5b"]
    step = forward_flops(config, 4096, 2) - forward_flops(config, 4096, 1)
    assert step == pytest.approx(14.1e12, rel=0.02)
    assert training_flops(config, 4096, 24, 8, "step") == pytest.approx(840e12, rel=0.03)


def test_mean_training_flops_equal_those_of_the_mean_depth():
    config = dataclasses.replace(CONFIG, mean_recurrence=32, mean_backprop_depth=8)
    assert mean_training_flops(config, T) == pytest.approx(training_flops(config, T, 25, 8), rel=0.02)


@pytest.mark.parametrize(
    ("device", "chip"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"),
        ("AMD Instinct MI300X", "MI300X"), ("AMD Instinct MI250X", "MI250X"),
    ],
)  # fmt: skip
def test_peak_is_known_by_the_full_name_of_a_gpu(device, chip):
    assert peak_of(device) == PEAK_FLOPS[chip]


@pytest.mark.parametrize("device", ["NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GH200 480GB", "AMD EPYC", ""])
def test_peak_of_another_device_is_unknown(device):
    assert peak_of(device) is None
