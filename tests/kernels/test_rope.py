"""Kernels for the bias of q and k and the rotary embedding."""

import pytest
import torch
from reference import DTYPES, check, error, random

import recurrent_depth_kernels as kernels
from recurrent_depth.model import ops
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.layers import rotary_at, rotary_table
from recurrent_depth_kernels.rope import rope, rope_gradient

SHAPES = [(2, 3, 11, 24), (1, 5, 1, 2), (3, 1, 3, 96), (1, 2, 55, 96)]  # B, T, H, K
SHAPES.append(pytest.param((1, 4096, 55, 96), marks=pytest.mark.gpu))


def rotary(K, positions, device):
    table = rotary_table(ModelConfig(n_embd=K, n_heads=1, block_size=8192))
    return [x.to(device) for x in rotary_at(table, positions)]


def both(cos, sin, H):
    fused = lambda *t: kernels.bias_rope(*t, cos, sin, H)  # noqa: E731
    plain = lambda *t: ops.bias_rope(*t, cos.double(), sin.double(), H)  # noqa: E731
    return fused, plain


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rope_and_gradients_equal_fp64(shape, dtype, device):
    B, T, H, K = shape
    qkv = random(B, T, 3 * H * K, dtype=dtype, device=device)
    bias = random(2, 1, H, K, dtype=dtype, device=device, seed=1)
    cos, sin = rotary(K, torch.arange(T)[None] + 3, device)
    check(*both(cos, sin, H), [qkv, bias], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "G", "K"), [(6, 2, 8), (4, 1, 24), (9, 3, 64)])
def test_rope_of_grouped_heads_equals_fp64(H, G, K, dtype, device):
    qkv = random(2, 3, (H + 2 * G) * K, dtype=dtype, device=device)
    cos, sin = rotary(K, torch.arange(3)[None] + 3, device)
    check(
        lambda x: kernels.bias_rope(x, None, cos, sin, H),
        lambda x: ops.bias_rope(x, None, cos.double(), sin.double(), H),
        [qkv],
        dtype,
    )


def test_rope_accepts_positions_per_row_without_bias(device):
    qkv = random(2, 3, 3 * 2 * 8, device=device)
    cos, sin = rotary(8, torch.tensor([[0, 1, 2], [7, 900, 8000]]), device)
    check(
        lambda x: kernels.bias_rope(x, None, cos, sin, 2),
        lambda x: ops.bias_rope(x, None, cos.double(), sin.double(), 2),
        [qkv],
        torch.float32,
    )


def test_rope_accepts_gradients_in_any_layout(device):
    """Attention may return gradients over memory [B, H, T, K], [B, T, H, K], or of different layouts."""
    B, T, H, K = 2, 3, 4, 6
    cos, sin = rotary(K, torch.arange(T)[None], device)
    fused, plain = both(cos, sin, H)
    qkv, bias = random(B, T, 3 * H * K, device=device), random(2, 1, H, K, device=device, seed=1)
    exact_inputs = [x.detach().double().requires_grad_() for x in (qkv, bias)]
    flat = [random(B, H, T, K, device=device, seed=s, gradient=False) for s in (2, 3, 4)]
    turned = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in flat]
    expanded = [g[:, :, :1, :1].expand(B, H, T, K) for g in flat]
    for directions in (flat, turned, expanded, [flat[0], turned[1], expanded[2]]):
        actual = torch.autograd.grad(fused(qkv, bias), (qkv, bias), directions)
        exact = torch.autograd.grad(plain(*exact_inputs), exact_inputs, [d.double() for d in directions])
        assert max(error(a, e) for a, e in zip(actual, exact, strict=True)) < 2e-6


def test_rope_accepts_a_non_contiguous_projection(device):
    qkv = random(3, 2, 3 * 16, device=device).transpose(0, 1)
    cos, sin = rotary(8, torch.arange(3)[None], device)
    q, k, v = kernels.bias_rope(qkv, None, cos, sin, 2)
    expected = ops.bias_rope(qkv.double().contiguous(), None, cos.double(), sin.double(), 2)
    assert max(error(a, e) for a, e in zip((q, k, v), expected, strict=True)) < 2e-6


def test_rope_passes_opcheck(device):
    """Check the ops inside `bias_rope`, which itself is an autograd function."""
    dtype = torch.bfloat16
    qkv = random(2, 3, 3 * 16, dtype=dtype, device=device, gradient=False)
    bias = random(2, 1, 2, 8, dtype=dtype, device=device, gradient=False)
    cos, sin = rotary(8, torch.arange(3)[None], device)
    torch.library.opcheck(rope.overload, (qkv, bias, cos, sin, 2))
    torch.library.opcheck(rope.overload, (qkv, None, cos, sin, 2))
    grads = [random(2, 2, 3, 8, dtype=dtype, device=device, gradient=False).transpose(1, 2) for _ in range(3)]
    torch.library.opcheck(rope_gradient.overload, (*grads, cos, sin, True))
