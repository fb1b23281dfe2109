"""The kernel for silu(gate) * up."""

import pytest
import torch
from reference import DTYPES, check, error, random

import recurrent_depth_kernels as kernels
from recurrent_depth.model import ops
from recurrent_depth_kernels.gated_mlp import swiglu_rows, swiglu_rows_backward

SHAPES = [(2, 3, 2 * 264), (5, 2 * 7), (1, 2 * 17_920), pytest.param((4096, 2 * 17_920), marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_and_gradients_equal_fp64(shape, dtype, device):
    check(kernels.swiglu, ops.swiglu, [random(*shape, dtype=dtype, device=device)], dtype)


def test_swiglu_accepts_non_contiguous_memory(device):
    x = random(12, 4, device=device)
    check(lambda x: kernels.swiglu(x.T), lambda x: ops.swiglu(x.T), [x], torch.float32)
    gradient = torch.autograd.grad(kernels.swiglu(x).sum(), x)[0]
    exact = x.detach().double().requires_grad_()
    assert error(gradient, torch.autograd.grad(ops.swiglu(exact).sum(), exact)[0]) < 2e-6


def test_swiglu_saturates_for_large_gates(device):
    x = torch.tensor([[-200.0, 200.0, 2.0, 3.0]], device=device, requires_grad=True)
    y = kernels.swiglu(x)
    y.sum().backward()
    assert y.tolist() == [[0.0, 600.0]]
    assert x.grad.tolist() == [[0.0, 3.0, 0.0, 200.0]]


def test_swiglu_refuses_a_second_gradient(device):
    x = random(2, 2 * 10, device=device)
    first = torch.autograd.grad(kernels.swiglu(x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_swiglu_passes_opcheck(device):
    x = random(2, 3, 2 * 10, dtype=torch.bfloat16, device=device)
    torch.library.opcheck(swiglu_rows.overload, (x,))
    torch.library.opcheck(swiglu_rows.overload, (x.transpose(0, 1),))
    torch.library.opcheck(swiglu_rows_backward.overload, (x.detach(), x.detach()[..., :10]))
