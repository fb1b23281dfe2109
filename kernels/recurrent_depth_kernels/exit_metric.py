"""How far a step moved the state, measured in the pass that writes it (arXiv 2502.05171, section 6.1).

Shapes: N rows (one a token), D width. For decoding: there is no backward pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from recurrent_depth_kernels.launch import Launch
from recurrent_depth_kernels.norm import load_sum, rounded
from recurrent_depth_kernels.registry import op, refuse_fp64
from recurrent_depth_kernels.tuning import row_settings


@triton.jit
def norm_change(
    x_ptr, branch_ptr, weight_ptr, before_ptr, after_ptr, change_ptr, width, eps,
    RELEASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: after = norm(x + branch) * weight, change = |after - before| / |after|, of the states as stored."""
    DTYPE: tl.constexpr = after_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    at = row * width + column
    h = load_sum(x_ptr, branch_ptr, at, mask, True, RELEASED)
    h = rounded(h * tl.rsqrt(tl.sum(h * h, 0) / width + eps), DTYPE, RELEASED)
    after = (h * tl.load(weight_ptr + column, mask=mask, other=0).to(tl.float32)).to(DTYPE)
    tl.store(after_ptr + at, after, mask=mask)
    after = after.to(tl.float32)
    moved = after - tl.load(before_ptr + at, mask=mask, other=0).to(tl.float32)
    tl.store(change_ptr + row, tl.sqrt(tl.sum(moved * moved, 0) / tl.sum(after * after, 0)))


@op
def add_norm_change(
    residual: Tensor, branch: Tensor, weight: Tensor, eps: float, before: Tensor, released_rounding: bool = False
) -> tuple[Tensor, Tensor]:
    """The last norm of a core step and the exit metric of every token.

    residual, branch and before (the state that the step began with) [..., D], weight [D]. Returns the new state
    [..., D] = rms_norm(residual + branch) and the change |new - before| / |new| [...] in fp32.
    """
    refuse_fp64(residual, "add_norm_change")
    residual, width = residual.contiguous(), residual.shape[-1]
    after = torch.empty_like(residual)
    change = residual.new_empty(residual.shape[:-1], dtype=torch.float32)
    block, warps = row_settings("norm", width, residual.dtype, residual.device)
    arguments = {
        "x_ptr": residual, "branch_ptr": branch.contiguous(), "weight_ptr": weight.contiguous(),
        "before_ptr": before.contiguous(), "after_ptr": after, "change_ptr": change, "width": width, "eps": eps,
    }  # fmt: skip
    constants = {"RELEASED": released_rounding, "BLOCK": block}
    Launch(norm_change, (change.numel(),), arguments, constants, warps, 1).run()
    return after, change
