"""The relative change of the state, in the norm that writes it."""

import pytest
import torch
from reference import DTYPES, TOLERANCE, error, random

import recurrent_depth_kernels as kernels
from recurrent_depth.generation.exits import StateChange
from recurrent_depth.model import ops

EPS = 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 264), (5, 7), (2, 5280)])
def test_state_and_change(shape, dtype, device):
    x, y, before = (random(*shape, dtype=dtype, device=device, seed=s, gradient=False) for s in (1, 2, 3))
    weight = random(shape[-1], dtype=dtype, device=device, seed=4, gradient=False).abs()
    after, change = kernels.add_norm_change(x, y, weight, EPS, before)
    assert error(after, ops.add_norm(x.double(), y.double(), weight.double(), EPS)) < TOLERANCE[dtype]
    moved = (after.double() - before.double()).norm(dim=-1) / after.double().norm(dim=-1)
    assert change.dtype == torch.float32
    assert error(change, moved) < 2e-6  # of the states as stored


def test_the_exit_rule_decides_the_same(device):
    x, y = (random(4, 9, 264, device=device, seed=s, gradient=False) for s in (1, 2))
    weight = torch.ones(264, device=device)
    settled = ops.add_norm(x, y, weight, EPS)
    before = settled + 0.01 * torch.arange(9, device=device)[:, None] * random(264, device=device, gradient=False)
    after, change = kernels.add_norm_change(x, y, weight, EPS, before)
    threshold = change.sort().values.flatten()[14:16].mean().item()  # between two tokens' changes
    expected, _ = StateChange(threshold).converged(before, after, lambda: after, before.new_empty(4, 9, 0))
    assert 0 < expected.sum() < 36
    assert torch.equal(change < threshold, expected)


def test_opcheck(device):
    x, y, before = (random(2, 3, 40, device=device, seed=s, gradient=False) for s in (1, 2, 3))
    torch.library.opcheck(kernels.add_norm_change, (x, y, torch.ones(40, device=device), EPS, before))
