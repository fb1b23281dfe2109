"""Residual add and RMS norms in one pass over a row, forward and backward.

    rms_norm            y = norm(x)
    add_norm            y = norm(x + branch)
    add_norm_norm       a = norm_a(x + branch), b = norm_b(a): norm_2 and norm_3, or norm_4 and the next block's norm_1

Everything is computed in fp32 and rounded once, to the inputs' dtype. With `released_rounding` the sum, the normalised
row and a are rounded as well, as released checkpoints had it in training (arXiv 2502.05171).

Shapes: N rows, D width. A program holds a whole row; the backward pass takes several rows a program and adds up the
gradients of the weights in registers.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from recurrent_depth_kernels.launch import Launch
from recurrent_depth_kernels.registry import op, refuse_fp64
from recurrent_depth_kernels.targets import processors
from recurrent_depth_kernels.tuning import row_settings


@triton.jit
def rounded(x, DTYPE: tl.constexpr, RELEASED: tl.constexpr):
    """x as it would be read back from memory in DTYPE, if RELEASED."""
    return x.to(DTYPE).to(tl.float32) if RELEASED else x


@triton.jit
def load_sum(x_ptr, branch_ptr, at, mask, HAS_BRANCH: tl.constexpr, RELEASED: tl.constexpr):
    """x + branch, or x, in fp32."""
    h = tl.load(x_ptr + at, mask=mask, other=0).to(tl.float32)
    if HAS_BRANCH:
        h += tl.load(branch_ptr + at, mask=mask, other=0).to(tl.float32)
        h = rounded(h, x_ptr.dtype.element_ty, RELEASED)
    return h


@triton.jit
def norm_forward(
    x_ptr, branch_ptr, weight_a_ptr, weight_b_ptr, a_ptr, b_ptr, scale_a_ptr, scale_b_ptr, width, eps,
    HAS_BRANCH: tl.constexpr, TWICE: tl.constexpr, RELEASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: a = norm(x + branch) * weight_a and, if TWICE, b = norm(a) * weight_b."""
    DTYPE: tl.constexpr = a_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    at = row * width + column
    h = load_sum(x_ptr, branch_ptr, at, mask, HAS_BRANCH, RELEASED)
    scale = tl.rsqrt(tl.sum(h * h, 0) / width + eps)
    tl.store(scale_a_ptr + row, scale)
    weight = tl.load(weight_a_ptr + column, mask=mask, other=0).to(tl.float32)
    a = rounded(rounded(h * scale, DTYPE, RELEASED) * weight, DTYPE, RELEASED)
    tl.store(a_ptr + at, a.to(DTYPE), mask=mask)
    if TWICE:
        scale = tl.rsqrt(tl.sum(a * a, 0) / width + eps)
        tl.store(scale_b_ptr + row, scale)
        weight = tl.load(weight_b_ptr + column, mask=mask, other=0).to(tl.float32)
        tl.store(b_ptr + at, (rounded(a * scale, DTYPE, RELEASED) * weight).to(DTYPE), mask=mask)


@triton.jit
def norm_backward(
    x_ptr, branch_ptr, weight_a_ptr, weight_b_ptr, scale_a_ptr, scale_b_ptr, grad_a_ptr, grad_b_ptr, grad_x_ptr,
    grad_weight_a_ptr, grad_weight_b_ptr, rows, width,
    HAS_BRANCH: tl.constexpr, TWICE: tl.constexpr, RELEASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows program, program + programs, ...: the gradient of x + branch, and this program's part of the weights'.

    Of y = h s w with s = 1 / rms(h): dh = s (g - n mean(g n)) where n = h s, g = dy w; and dw = dy n.
    """
    column = tl.arange(0, BLOCK)
    mask = column < width
    total_a = tl.zeros((BLOCK,), tl.float32)
    total_b = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * width
    start = first
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = start + column
        scale = tl.load(scale_a_ptr + row)
        normal = load_sum(x_ptr, branch_ptr, at, mask, HAS_BRANCH, RELEASED) * scale
        weight = tl.load(weight_a_ptr + column, mask=mask, other=0).to(tl.float32)
        if TWICE:
            scale_b = tl.load(scale_b_ptr + row)
            grad_b = tl.load(grad_b_ptr + at, mask=mask, other=0).to(tl.float32)
            total_b += grad_b * (normal * weight * scale_b)
            grad_b *= tl.load(weight_b_ptr + column, mask=mask, other=0).to(tl.float32)
            mean = scale_b * tl.sum(grad_b * (normal * weight), 0) / width
            grad = scale_b * (grad_b - normal * weight * (scale_b * mean))
            grad += tl.load(grad_a_ptr + at, mask=mask, other=0).to(tl.float32)  # here, to hold fewer registers
        else:
            grad = tl.load(grad_a_ptr + at, mask=mask, other=0).to(tl.float32)
        total_a += grad * normal
        grad *= weight
        grad = scale * (grad - normal * (tl.sum(grad * normal, 0) / width))
        tl.store(grad_x_ptr + at, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
        start += tl.num_programs(0) * width
    tl.store(grad_weight_a_ptr + first + column, total_a, mask=mask)
    if TWICE:
        tl.store(grad_weight_b_ptr + first + column, total_b, mask=mask)


@op
def norm_rows(
    x: Tensor, branch: Tensor | None, weight_a: Tensor, weight_b: Tensor | None, eps: float, released_rounding: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a and b [..., D] and the scales 1 / rms of both norms [N] in fp32; what a call does not make is empty."""
    refuse_fp64(x, "norm")
    x, branch = x.contiguous(), None if branch is None else branch.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    a, scale_a = torch.empty_like(x, dtype=dtype), x.new_empty(rows, dtype=torch.float32)
    b, scale_b = (a.new_empty(0), scale_a.new_empty(0)) if weight_b is None else map(torch.empty_like, (a, scale_a))
    block, warps = row_settings("norm", width, dtype, x.device)
    arguments = {
        "x_ptr": x, "branch_ptr": x if branch is None else branch, "weight_a_ptr": weight_a.contiguous(),
        "weight_b_ptr": weight_a if weight_b is None else weight_b.contiguous(), "a_ptr": a, "b_ptr": b,
        "scale_a_ptr": scale_a, "scale_b_ptr": scale_b, "width": width, "eps": eps,
    }  # fmt: skip
    constants = {
        "HAS_BRANCH": branch is not None, "TWICE": weight_b is not None, "RELEASED": released_rounding, "BLOCK": block,
    }  # fmt: skip
    Launch(norm_forward, (rows,), arguments, constants, warps, 1).run()
    return a, b, scale_a, scale_b


@op
def norm_rows_backward(
    x: Tensor, branch: Tensor | None, weight_a: Tensor, weight_b: Tensor | None, scale_a: Tensor, scale_b: Tensor,
    grad_a: Tensor, grad_b: Tensor, released_rounding: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x + branch [..., D], and in fp32 of weight_a and weight_b [D] (empty without weight_b)."""
    x, branch = x.contiguous(), None if branch is None else branch.contiguous()
    width, rows = x.shape[-1], scale_a.numel()
    programs = min(rows, processors(x.device))
    grad_x = torch.empty_like(x, dtype=grad_a.dtype)
    part_a = x.new_empty((programs, width), dtype=torch.float32)
    part_b = part_a.new_empty((0, 0) if weight_b is None else (programs, width))
    name = "norm_backward" if weight_b is None else "norm_norm_backward"
    block, warps = row_settings(name, width, grad_a.dtype, x.device)
    arguments = {
        "x_ptr": x, "branch_ptr": x if branch is None else branch, "weight_a_ptr": weight_a.contiguous(),
        "weight_b_ptr": weight_a if weight_b is None else weight_b.contiguous(), "scale_a_ptr": scale_a,
        "scale_b_ptr": scale_b, "grad_a_ptr": grad_a.contiguous(), "grad_b_ptr": grad_b.contiguous(),
        "grad_x_ptr": grad_x, "grad_weight_a_ptr": part_a, "grad_weight_b_ptr": part_b, "rows": rows, "width": width,
    }  # fmt: skip
    constants = {
        "HAS_BRANCH": branch is not None, "TWICE": weight_b is not None, "RELEASED": released_rounding, "BLOCK": block,
    }  # fmt: skip
    Launch(norm_backward, (programs,), arguments, constants, warps, 1).run()
    return grad_x, part_a.sum(0), part_b.sum(0)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, weight_a, weight_b, _, ctx.released_rounding = inputs
    ctx.save_for_backward(x, branch, weight_a, weight_b, *output[2:])


def _differentiate(ctx: Any, grad_a: Tensor, grad_b: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, branch, weight_a, weight_b, scale_a, scale_b = ctx.saved_tensors
    grad, grad_weight_a, grad_weight_b = norm_rows_backward(
        x, branch, weight_a, weight_b, scale_a, scale_b, grad_a, grad_b, ctx.released_rounding
    )
    grad_branch = None if branch is None else grad.to(branch.dtype)
    grad_weight_b = None if weight_b is None else grad_weight_b.to(weight_b.dtype)
    return grad.to(x.dtype), grad_branch, grad_weight_a.to(weight_a.dtype), grad_weight_b, None, None


norm_rows.register_autograd(_differentiate, setup_context=_remember)


def rms_norm(x: Tensor, weight: Tensor, eps: float, released_rounding: bool = False) -> Tensor:
    """x [..., D], weight [D] -> x / sqrt(mean(x²) + eps) * weight [..., D]."""
    return norm_rows(x, None, weight, None, eps, released_rounding)[0]


def add_norm(residual: Tensor, branch: Tensor, weight: Tensor, eps: float, released_rounding: bool = False) -> Tensor:
    """rms_norm(residual + branch) [..., D]."""
    return norm_rows(residual, branch, weight, None, eps, released_rounding)[0]


def add_norm_norm(
    residual: Tensor, branch: Tensor, weight_a: Tensor, weight_b: Tensor, eps: float, released_rounding: bool = False
) -> tuple[Tensor, Tensor]:
    """a = rms_norm(residual + branch, weight_a) and b = rms_norm(a, weight_b), both [..., D]."""
    return norm_rows(residual, branch, weight_a, weight_b, eps, released_rounding)[:2]
