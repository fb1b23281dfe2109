"""Residual add and RMS norm kernels."""

import pytest
import torch
from reference import DTYPES, TOLERANCE, check, error, random, scattered

import recurrent_depth_kernels as kernels
from recurrent_depth.model import ops
from recurrent_depth_kernels.norm import norm_rows, norm_rows_backward

EPS = 1e-6
SHAPES = [(2, 3, 264), (5, 7), (1, 1, 96), (3, 5280), pytest.param((4096, 5280), marks=pytest.mark.gpu)]


def weights(width, count, dtype, device):
    return [
        (random(width, seed=5 + i, gradient=False).abs() + 0.5).to(device, dtype).requires_grad_() for i in range(count)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_and_gradients_equal_fp64(shape, dtype, device):
    x, y = (random(*shape, dtype=dtype, device=device, seed=s) for s in (1, 2))
    (a,) = weights(shape[-1], 1, dtype, device)
    check(lambda x, w: kernels.rms_norm(x, w, EPS), lambda x, w: ops.rms_norm(x, w, EPS), [x, a], dtype)
    check(lambda *t: kernels.add_norm(*t, EPS), lambda *t: ops.add_norm(*t, EPS), [x, y, a], dtype)


def test_norms_accept_non_contiguous_memory(device):
    x, y, weight = random(3, 4, 40, device=device), random(4, 40, 3, device=device, seed=1), random(40, device=device)
    check(
        lambda x, y, w: kernels.add_norm(scattered(x), y.permute(2, 0, 1), scattered(w), EPS),
        lambda x, y, w: ops.add_norm(x, y.permute(2, 0, 1), w, EPS),
        [x, y, weight],
        torch.float32,
    )


def test_norms_accept_expanded_gradients(device):
    x, weight = random(3, 40, device=device), random(40, device=device, seed=1)
    kernels.rms_norm(x, weight, EPS).sum().backward()  # the incoming gradient has stride 0
    exact, exact_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    ops.rms_norm(exact, exact_weight, EPS).sum().backward()
    assert error(x.grad, exact.grad) < 2e-6
    assert error(weight.grad, exact_weight.grad) < 2e-6


def test_norm_adds_a_bfloat16_branch_to_a_float32_residual(device):
    """As with autocast: each input gets its gradient in its own dtype."""
    x, y = random(4, 72, device=device), random(4, 72, dtype=torch.bfloat16, device=device, seed=1)
    weight = random(72, device=device, seed=2)
    out = kernels.add_norm(x, y, weight, EPS)
    assert out.dtype == torch.float32
    out.square().sum().backward()
    assert (x.grad.dtype, y.grad.dtype) == (torch.float32, torch.bfloat16)
    assert error(y.grad, x.grad) < TOLERANCE[torch.bfloat16]


def test_norm_of_zeros_is_zero(device):
    x = torch.zeros(2, 24, device=device, requires_grad=True)
    y = kernels.rms_norm(x, torch.ones(24, device=device), EPS)
    y.sum().backward()
    assert y.abs().max() == 0
    assert x.grad.isfinite().all()


def test_norm_accepts_no_rows(device):
    x, weight = random(0, 24, device=device), random(24, device=device)
    y = kernels.rms_norm(x, weight, EPS)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 24)
    assert weight.grad.abs().sum() == 0


def test_released_rounding_equals_the_released_code(device):
    x, y = (random(16, 264, dtype=torch.bfloat16, device=device, seed=s, gradient=False) for s in (1, 2))
    a, b = (w.detach() for w in weights(264, 2, torch.bfloat16, device))

    def released(h, weight):  # normalise in fp32, round, multiply in bfloat16
        return (h.float() * torch.rsqrt(h.float().square().mean(-1, keepdim=True) + EPS)).to(h.dtype) * weight

    def twice(by, rounding):
        first = by.add_norm(x, y, a, EPS, rounding)
        return first, by.rms_norm(first, b, EPS, rounding)

    first = released(x + y, a)
    expected = first, released(first, b)
    for mine, theirs, torchs in zip(twice(kernels, True), expected, twice(ops, True), strict=True):
        assert torch.equal(torchs, theirs)
        assert (mine != theirs).float().mean() < 0.002  # the order of a sum may change a rounding
    once = twice(kernels, False)
    assert (once[1] != expected[1]).float().mean() > 0.05


def test_norm_kernel_refuses_float64(device):
    with pytest.raises(ValueError, match="kernels: torch"):
        kernels.rms_norm(torch.ones(2, 8, dtype=torch.float64, device=device), torch.ones(8, device=device), EPS)


def test_norms_pass_opcheck(device):
    x, y = (random(2, 3, 40, dtype=torch.bfloat16, device=device, seed=s) for s in (1, 2))
    (weight,) = weights(40, 1, torch.bfloat16, device)
    torch.library.opcheck(norm_rows.overload, (x, None, weight, EPS, False))
    torch.library.opcheck(norm_rows.overload, (x.transpose(0, 1), y.transpose(0, 1), weight, EPS, True))
    out, scale = (t.detach() for t in norm_rows(x, y, weight, EPS, False))
    torch.library.opcheck(norm_rows_backward.overload, (*(t.detach() for t in (x, y, weight)), scale, out, False))
