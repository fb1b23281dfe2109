"""Philox, noise, and initial weights."""

import math

import pytest
import torch

from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.random import philox, truncated_normal
from recurrent_depth.model.transformer import RecurrentDepthModel

# Known answers of Philox4x32-10, from the authors' Random123 library.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, expected):
    words = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in words) == expected


def noise(rows, positions, channels=6, **names):
    return truncated_normal(torch.tensor(rows), torch.tensor(positions)[None], channels, **({"seed": 7} | names))


def test_noise_depends_on_its_counter_not_on_the_layout():
    whole = noise([0, 1, 2, 3], [0, 1, 2, 3, 4])
    assert torch.equal(noise([2, 3], [1, 4]), whole[2:][:, [1, 4]])
    assert torch.equal(noise([1], [0, 1], channels=3), whole[1:2, :2, :3])
    for other in ({"seed": 8}, {"seed": 7 + 2**32}, {"step": 1}, {"stream": 9}):
        assert not torch.allclose(noise([0, 1, 2, 3], [0, 1, 2, 3, 4], **other), whole)


def test_noise_is_normal_truncated_at_three_sigma():
    values = noise(list(range(200)), list(range(50)), channels=64).flatten().double()
    assert values.abs().max() <= 3.0001
    assert values.mean().abs() < 0.005
    # variance of a normal truncated at 3: 1 - 6 phi(3) / (2 Phi(3) - 1)
    variance = 1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2))
    assert values.var().item() == pytest.approx(variance, abs=0.005)
    assert (values < -1).double().mean().item() == pytest.approx(0.1576, abs=0.003)


def test_initial_weights_have_the_published_scale_in_any_order():
    config = ModelConfig(n_embd=192, n_heads=4, intermediate_size=512, vocab_size=1024, mean_recurrence=4)
    model = RecurrentDepthModel(config)
    model.initialise(3)
    truncated = 0.9866  # standard deviation of a normal truncated at 3 sigma
    std = math.sqrt(2 / (5 * 192))
    parts = model.transformer
    assert parts.wte.weight.std().item() == pytest.approx(std * truncated, rel=0.02)
    assert parts.core_block[0].attn.Wqkv.weight.std().item() == pytest.approx(std * truncated, rel=0.02)
    out = std / math.sqrt(2 * (1 + 4 + 1))
    assert parts.coda[0].mlp.proj.weight.std().item() == pytest.approx(out * truncated, rel=0.02)
    assert torch.equal(parts.ln_f.weight, torch.ones(192))
    assert not torch.equal(parts.prelude[0].mlp.fc.weight, parts.coda[0].mlp.fc.weight)
    again = RecurrentDepthModel(config)
    again.initialise(3)
    assert torch.equal(again.transformer.adapter.weight, parts.adapter.weight)


def test_initial_state_has_variance_two_fifths():
    assert ModelConfig(n_embd=512, n_heads=8).state_std ** 2 == pytest.approx(0.4)
