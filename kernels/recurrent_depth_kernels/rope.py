"""Bias of q and k and rotary embedding of interleaved pairs, forward and backward.

One pass over the fused projection: p * cos + flip(p) * sin for q and k, where `sin` carries the sign of its pair
(-, +, -, +, ...) and flip swaps the elements of a pair; v is a view of the projection. The backward pass writes the
gradient of the projection once.

Shapes: B batch, T tokens, H query heads, G key heads, K head size; width H K of q, G K of k and v.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from recurrent_depth_kernels.launch import Launch
from recurrent_depth_kernels.registry import op, refuse_fp64
from recurrent_depth_kernels.targets import processors
from recurrent_depth_kernels.tuning import settings


@triton.jit
def flipped(x, BLOCK: tl.constexpr):
    """Swap the elements of every pair (0, 1), (2, 3), ... in registers."""
    even, odd = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
    return tl.reshape(tl.join(odd, even), (BLOCK,))


@triton.jit
def rope_forward(
    qkv_ptr, bias_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, tokens, width, kv_width, rotary_batch,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK columns of q and k of one token. `rotary_batch` is the stride between the tables of two rows."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask, kv_mask = column < width, column < kv_width
    turn = row // tokens * rotary_batch + row % tokens * K + column % K
    cos = tl.load(cos_ptr + turn, mask=mask, other=0)
    sin = tl.load(sin_ptr + turn, mask=mask, other=0)
    source = qkv_ptr + row * (width + 2 * kv_width) + column
    q = tl.load(source, mask=mask, other=0).to(tl.float32)
    k = tl.load(source + width, mask=kv_mask, other=0).to(tl.float32)
    if HAS_BIAS:
        q += tl.load(bias_ptr + column, mask=mask, other=0).to(tl.float32)
        k += tl.load(bias_ptr + width + column, mask=mask, other=0).to(tl.float32)
    q = q * cos + flipped(q, BLOCK) * sin
    k = k * cos + flipped(k, BLOCK) * sin
    tl.store(q_ptr + row * width + column, q.to(q_ptr.dtype.element_ty), mask=mask)
    tl.store(k_ptr + row * kv_width + column, k.to(k_ptr.dtype.element_ty), mask=kv_mask)


@triton.jit
def rope_backward(
    grad_q_ptr, grad_k_ptr, grad_v_ptr, cos_ptr, sin_ptr, grad_qkv_ptr, grad_bias_ptr, rows, tokens, width, kv_width,
    rotary_batch, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK columns of the gradient of tokens program, program + programs, ..., and a part of the bias's.

    The transpose of the rotation is dp = dy * cos + flip(dy * sin).
    """
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask, kv_mask = column < width, column < kv_width
    head, channel = column // K, column % K
    total_q = tl.zeros((BLOCK,), tl.float32)
    total_k = tl.zeros((BLOCK,), tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        b, t = (row // tokens).to(tl.int64), row % tokens
        turn = b * rotary_batch + t * K + channel
        cos = tl.load(cos_ptr + turn, mask=mask, other=0)
        sin = tl.load(sin_ptr + turn, mask=mask, other=0)
        at_q = b * stride_qb + t * stride_qt + head * stride_qh + channel
        at_k = b * stride_kb + t * stride_kt + head * stride_kh + channel
        q = tl.load(grad_q_ptr + at_q, mask=mask, other=0).to(tl.float32)
        k = tl.load(grad_k_ptr + at_k, mask=kv_mask, other=0).to(tl.float32)
        q = q * cos + flipped(q * sin, BLOCK)
        k = k * cos + flipped(k * sin, BLOCK)
        total_q += q
        total_k += k
        target = grad_qkv_ptr + (b * tokens + t) * (width + 2 * kv_width) + column
        tl.store(target, q.to(grad_qkv_ptr.dtype.element_ty), mask=mask)
        tl.store(target + width, k.to(grad_qkv_ptr.dtype.element_ty), mask=kv_mask)
        tl.store(target + width + kv_width, tl.load(grad_v_ptr + at_k, mask=kv_mask, other=0), mask=kv_mask)
    if HAS_BIAS:
        part = grad_bias_ptr + tl.program_id(0).to(tl.int64) * 2 * width + column
        tl.store(part, total_q, mask=mask)
        tl.store(part + width, total_k, mask=mask)


@op
def rope(qkv: Tensor, qk_bias: Tensor | None, cos: Tensor, sin: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    """Return rotated q [B, T, H, K] and k [B, T, G, K] of a projection, contiguous. `bias_rope` has gradients."""
    refuse_fp64(qkv, "rope")
    (B, T, columns), K = qkv.shape, cos.shape[-1]
    width, kv_width = n_heads * K, (columns - n_heads * K) // 2
    q, k = (qkv.new_empty((B, T, n // K, K)) for n in (width, kv_width))
    chosen = settings("rope", width, qkv.dtype, qkv.device)
    arguments = {
        "qkv_ptr": qkv.contiguous(), "bias_ptr": qkv if qk_bias is None else qk_bias.contiguous(),
        "cos_ptr": cos.contiguous(), "sin_ptr": sin.contiguous(), "q_ptr": q, "k_ptr": k, "tokens": T, "width": width,
        "kv_width": kv_width, "rotary_batch": _rotary_batch(cos),
    }  # fmt: skip
    constants = {"K": K, "HAS_BIAS": qk_bias is not None, "BLOCK": chosen["block"]}
    grid = (B * T, triton.cdiv(width, chosen["block"]))
    Launch(rope_forward, grid, arguments, constants, chosen["num_warps"], 1).run()
    return q, k


@op
def rope_gradient(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradient of the projection [B, T, (H + 2 G) K], and of the bias [2, 1, H, K] in fp32, empty if None.

    Args:
        grad_q: [B, T, H, K].
        grad_k, grad_v: [B, T, G, K].
    """
    B, T, H, K = grad_q.shape
    width, kv_width, rows = H * K, grad_k.shape[2] * K, B * T
    grads = grad_q, grad_k, grad_v
    if grad_k.stride() != grad_v.stride() or any(g.stride(-1) != 1 for g in grads):
        grads = grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous()
    programs = min(rows, processors(grad_q.device))
    grad_qkv = grad_q.new_empty((B, T, width + 2 * kv_width))
    part = grad_q.new_empty((programs if has_bias else 0, 2, 1, H, K), dtype=torch.float32)
    chosen = settings("rope_backward", width, grad_q.dtype, grad_q.device)
    strides = zip(("qb", "qt", "qh", "kb", "kt", "kh"), (*grads[0].stride()[:3], *grads[1].stride()[:3]), strict=True)
    arguments = {
        "grad_q_ptr": grads[0], "grad_k_ptr": grads[1], "grad_v_ptr": grads[2], "cos_ptr": cos.contiguous(),
        "sin_ptr": sin.contiguous(), "grad_qkv_ptr": grad_qkv, "grad_bias_ptr": part, "rows": rows, "tokens": T,
        "width": width, "kv_width": kv_width, "rotary_batch": _rotary_batch(cos),
        **{f"stride_{name}": stride for name, stride in strides},
    }  # fmt: skip
    constants = {"K": K, "HAS_BIAS": has_bias, "BLOCK": chosen["block"]}
    grid = (programs, triton.cdiv(width, chosen["block"]))
    Launch(rope_backward, grid, arguments, constants, chosen["num_warps"], 1).run()
    return grad_qkv, part.sum(0)


def _rotary_batch(cos: Tensor) -> int:
    """Return the number of elements between the tables [T, K] of two rows; 0 if all rows share one table."""
    return 0 if cos.shape[0] == 1 else cos.shape[1] * cos.shape[2]


class _BiasRope(torch.autograd.Function):
    """bias_rope with its gradient. It is not an op, because v is a view of the input, which an op must not return."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, qk_bias: Tensor | None, cos: Tensor, sin: Tensor, n_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ctx.bias_dtype = None if qk_bias is None else qk_bias.dtype
        ctx.save_for_backward(cos, sin)
        q, k = rope(qkv, qk_bias, cos, sin, n_heads)
        return q, k, qkv.unflatten(-1, (-1, cos.shape[-1]))[:, :, n_heads + k.shape[2] :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        has_bias = ctx.bias_dtype is not None
        grad_qkv, grad_bias = rope_gradient(*grads, *ctx.saved_tensors, has_bias)
        return grad_qkv, grad_bias.to(ctx.bias_dtype) if has_bias else None, None, None, None


def bias_rope(
    qkv: Tensor, qk_bias: Tensor | None, cos: Tensor, sin: Tensor, n_heads: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Split a projection into q, k and v, add the bias of q and k, and rotate their interleaved pairs.

    Args:
        qkv: [B, T, (H + 2 G) K]: H query heads, G key heads, G value heads.
        qk_bias: [2, 1, H, K] with G = H, or None.
        cos, sin: [B or 1, T, K] in fp32; `sin` carries the sign of its pair.

    Returns:
        q [B, H, T, K], k and v [B, G, T, K], in memory [B, T, H or G, K]; v is a view of qkv.
    """
    q, k, v = _BiasRope.apply(qkv, qk_bias, cos, sin, n_heads)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
