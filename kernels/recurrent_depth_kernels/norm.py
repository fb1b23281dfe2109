"""Residual add and RMS norm in one pass over a row, forward and backward.

    rms_norm            y = norm(x)
    add_norm            y = norm(x + branch)

Everything is computed in fp32 and rounded once, to the dtype of the inputs. With `released_rounding` the sum and the
normalised row are rounded too, as in the training of the released checkpoints (arXiv 2502.05171).

Shapes: N rows, D width. A program holds a whole row; in the backward pass it processes several rows and accumulates the
gradient of the weight in registers.
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
    """Return x rounded to DTYPE if RELEASED, else x."""
    return x.to(DTYPE).to(tl.float32) if RELEASED else x


@triton.jit
def load_sum(x_ptr, branch_ptr, at, mask, HAS_BRANCH: tl.constexpr, RELEASED: tl.constexpr):
    """Return x + branch, or x, in fp32."""
    h = tl.load(x_ptr + at, mask=mask, other=0).to(tl.float32)
    if HAS_BRANCH:
        h += tl.load(branch_ptr + at, mask=mask, other=0).to(tl.float32)
        h = rounded(h, x_ptr.dtype.element_ty, RELEASED)
    return h


@triton.jit
def norm_forward(
    x_ptr, branch_ptr, weight_ptr, y_ptr, scale_ptr, width, eps,
    HAS_BRANCH: tl.constexpr, RELEASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute one row: y = norm(x + branch) * weight."""
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    at = row * width + column
    h = load_sum(x_ptr, branch_ptr, at, mask, HAS_BRANCH, RELEASED)
    scale = tl.rsqrt(tl.sum(h * h, 0) / width + eps)
    tl.store(scale_ptr + row, scale)
    weight = tl.load(weight_ptr + column, mask=mask, other=0).to(tl.float32)
    tl.store(y_ptr + at, (rounded(h * scale, DTYPE, RELEASED) * weight).to(DTYPE), mask=mask)


@triton.jit
def norm_backward(
    x_ptr, branch_ptr, weight_ptr, scale_ptr, grad_ptr, grad_x_ptr, grad_weight_ptr, rows, width,
    HAS_BRANCH: tl.constexpr, RELEASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of rows program, program + programs, ..., and this program's part of the weight's gradient.

    For y = h s w with s = 1 / rms(h): dh = s (g - n mean(g n)) where n = h s, g = dy w; and dw = dy n.
    """
    column = tl.arange(0, BLOCK)
    mask = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * width
    start = first
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = start + column
        scale = tl.load(scale_ptr + row)
        normal = load_sum(x_ptr, branch_ptr, at, mask, HAS_BRANCH, RELEASED) * scale
        grad = tl.load(grad_ptr + at, mask=mask, other=0).to(tl.float32)
        total += grad * normal
        grad *= tl.load(weight_ptr + column, mask=mask, other=0).to(tl.float32)
        grad = scale * (grad - normal * (tl.sum(grad * normal, 0) / width))
        tl.store(grad_x_ptr + at, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
        start += tl.num_programs(0) * width
    tl.store(grad_weight_ptr + first + column, total, mask=mask)


@op
def norm_rows(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, released_rounding: bool
) -> tuple[Tensor, Tensor]:
    """Return y [..., D] and the scales 1 / rms [N] in fp32."""
    refuse_fp64(x, "norm")
    x, branch = x.contiguous(), None if branch is None else branch.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    y, scale = torch.empty_like(x, dtype=dtype), x.new_empty(rows, dtype=torch.float32)
    block, warps = row_settings("norm", width, dtype, x.device)
    arguments = {
        "x_ptr": x, "branch_ptr": x if branch is None else branch, "weight_ptr": weight.contiguous(), "y_ptr": y,
        "scale_ptr": scale, "width": width, "eps": eps,
    }  # fmt: skip
    constants = {"HAS_BRANCH": branch is not None, "RELEASED": released_rounding, "BLOCK": block}
    Launch(norm_forward, (rows,), arguments, constants, warps, 1).run()
    return y, scale


@op
def norm_rows_backward(
    x: Tensor, branch: Tensor | None, weight: Tensor, scale: Tensor, grad: Tensor, released_rounding: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x + branch [..., D], and of weight [D] in fp32."""
    x, branch = x.contiguous(), None if branch is None else branch.contiguous()
    width, rows = x.shape[-1], scale.numel()
    programs = min(rows, processors(x.device))
    grad_x = torch.empty_like(x, dtype=grad.dtype)
    parts = x.new_empty((programs, width), dtype=torch.float32)
    block, warps = row_settings("norm_backward", width, grad.dtype, x.device)
    arguments = {
        "x_ptr": x, "branch_ptr": x if branch is None else branch, "weight_ptr": weight.contiguous(),
        "scale_ptr": scale, "grad_ptr": grad.contiguous(), "grad_x_ptr": grad_x, "grad_weight_ptr": parts,
        "rows": rows, "width": width,
    }  # fmt: skip
    constants = {"HAS_BRANCH": branch is not None, "RELEASED": released_rounding, "BLOCK": block}
    Launch(norm_backward, (programs,), arguments, constants, warps, 1).run()
    return grad_x, parts.sum(0)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, weight, _, ctx.released_rounding = inputs
    ctx.save_for_backward(x, branch, weight, output[1])


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, branch, weight, scale = ctx.saved_tensors
    grad, grad_weight = norm_rows_backward(x, branch, weight, scale, grad, ctx.released_rounding)
    grad_branch = None if branch is None else grad.to(branch.dtype)
    return grad.to(x.dtype), grad_branch, grad_weight.to(weight.dtype), None, None


norm_rows.register_autograd(_differentiate, setup_context=_remember)


def rms_norm(x: Tensor, weight: Tensor, eps: float, released_rounding: bool = False) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) * weight for x [..., D] and weight [D]."""
    return norm_rows(x, None, weight, eps, released_rounding)[0]


def add_norm(residual: Tensor, branch: Tensor, weight: Tensor, eps: float, released_rounding: bool = False) -> Tensor:
    """Return rms_norm(residual + branch) [..., D]."""
    return norm_rows(residual, branch, weight, eps, released_rounding)[0]
