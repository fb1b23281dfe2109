"""The noise kernel against recurrent_depth/model/random.py."""

import math

import pytest
import torch

import recurrent_depth_kernels as kernels
from recurrent_depth.model import random
from recurrent_depth_kernels.noise import truncated_normal_rows

LIMIT = {"cpu": 1e-6, "cuda": 4e-6}
"""Error of normal numbers; the logarithm of a GPU is approximate."""


def named(device, rows, positions):
    return torch.tensor(rows, device=device), torch.tensor(positions, device=device)


@pytest.mark.parametrize(("seed", "step", "stream"), [(0, 0, 1), (2**40 + 3, 2**31 + 5, 1), (-7, 16, 9), (1, 1, 1)])
def test_noise_equals_that_of_the_model(seed, step, stream, device):
    rows, positions = named(device, [0, 3, 2**24 + 5], [[0, 1, 70_000]])
    names = {"seed": seed, "step": step, "stream": stream}
    actual = kernels.truncated_normal(rows, positions, 267, **names)
    u = random.uniform(rows, positions, 267, **names)
    # Compare the bits: a float32 normal determines its 23 random bits, so they can be recovered by inversion.
    recovered = torch.special.erf(actual.double() / math.sqrt(2)) / (2 * math.erf(3 / math.sqrt(2))) + 0.5
    assert (recovered - u.double()).abs().max() < 2.0**-23 * 2
    exact = torch.erfinv(((2 * u - 1) * math.erf(3 / math.sqrt(2))).double()) * math.sqrt(2)
    assert (actual - exact).abs().max() < LIMIT[device]
    assert (actual - random.truncated_normal(rows, positions, 267, **names)).abs().max() < LIMIT[device]


def test_noise_depends_on_its_counter_not_on_the_layout(device):
    rows, positions = named(device, [0, 1, 2, 3], [[0, 1, 2, 3, 4]])
    whole = kernels.truncated_normal(rows, positions, 6, seed=7)
    part = kernels.truncated_normal(*named(device, [2, 3], [[1, 4]]), 6, seed=7)
    assert torch.equal(part, whole[2:][:, [1, 4]])
    own = kernels.truncated_normal(*named(device, [1, 1], [[0, 1], [2, 4]]), 5, seed=7)
    assert torch.equal(own[1], whole[1, [2, 4], :5])


def test_noise_is_right_in_the_tails(device):
    """Up to the truncation at 3 sigma."""
    rows, positions = named(device, [0], [[0]])
    channels = 2**17
    actual = kernels.truncated_normal(rows, positions, channels, seed=11).flatten()
    u = random.uniform(rows, positions, channels, seed=11).flatten()
    exact = torch.erfinv(((2 * u - 1) * math.erf(3 / math.sqrt(2))).double()) * math.sqrt(2)
    assert actual.abs().max() > 2.99
    assert (actual - exact).abs().max() < LIMIT[device]


def test_noise_passes_opcheck(device):
    rows, positions = named(device, [0, 5], [[0, 1, 7]])
    torch.library.opcheck(truncated_normal_rows.overload, (rows, positions, 10, 3, 1, -2))
