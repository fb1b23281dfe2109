"""Norm and radius by JVP equal those of the dense Jacobian."""

import pytest
import torch

from recurrent_depth.analysis.attention_maps import plain_attention
from recurrent_depth.analysis.passage import Passage
from recurrent_depth.analysis.spectrum import gain, spectral_radius, token_radius
from support import lively_model

IDS = [5, 9, 2, 31, 7]


@pytest.fixture(scope="module")
def place():
    """A passage of a small model in fp64 and the state after three iterations."""
    model = lively_model(scale=1.5)
    with torch.no_grad():
        passage = Passage(model, IDS, plain_attention())
        return passage, passage.iterate(passage.zero_state(), 3)


@pytest.fixture(scope="module")
def dense(place):
    """The dense Jacobian of an iteration, [T, D, T, D]."""
    passage, state = place
    return torch.autograd.functional.jacobian(lambda s: passage.iterate(s, 1), state)


def radius_of(matrix):
    return float(torch.linalg.eigvals(matrix).abs().max())


@torch.no_grad()
def test_radius_of_a_token_equals_dense_eigenvalues(place, dense):
    passage, state = place
    found = [token_radius(passage, state, token) for token in range(len(IDS))]
    for token, radius in enumerate(found):
        assert radius.value == pytest.approx(radius_of(dense[token, :, token]), rel=1e-8)
        assert radius.residual < 1e-8
    size = state.numel()
    assert max(radius.value for radius in found) == pytest.approx(radius_of(dense.reshape(size, size)), rel=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_gain_estimates_the_frobenius_norm(place, dense):
    passage, state = place
    exact = float(dense.square().sum() / state.numel()) ** 0.5
    assert gain(passage, state, draws=400) == pytest.approx(exact, rel=0.02)


def test_radius_of_a_wide_map_needs_few_directions():
    random = torch.Generator().manual_seed(0)
    basis = torch.randn(300, 300, generator=random, dtype=torch.float64)
    sizes = torch.linspace(0.01, 0.9, 300, dtype=torch.float64)
    pair = torch.tensor([[0.3, 1.0], [-1.0, 0.3]], dtype=torch.float64)  # a pair of complex eigenvalues
    inner = torch.diag(sizes)
    inner[-2:, -2:] = pair
    matrix = basis @ inner @ torch.linalg.inv(basis)
    found = spectral_radius(lambda v: matrix @ v, matrix[0], krylov=24, restarts=20)
    assert found.value == pytest.approx((0.3**2 + 1) ** 0.5, rel=1e-4)


def test_plain_attention_equals_the_attention_of_the_model():
    model = lively_model()
    maps = {}
    with torch.no_grad():
        plain, fused = Passage(model, IDS, plain_attention(maps)), Passage(model, IDS)
        states = [passage.iterate(passage.zero_state(), 4) for passage in (plain, fused)]
    torch.testing.assert_close(*states, rtol=1e-10, atol=1e-10)
    for probabilities in maps.values():
        assert probabilities.shape == (2, 5, 5)
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 5).double())
        assert torch.equal(probabilities.triu(1), torch.zeros(2, 5, 5).double())
