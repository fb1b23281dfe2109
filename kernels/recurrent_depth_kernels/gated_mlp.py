"""silu(gate) * up of a fused projection, forward and backward. Shapes: N rows, I inner width."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from recurrent_depth_kernels.launch import Launch
from recurrent_depth_kernels.registry import op, refuse_fp64
from recurrent_depth_kernels.tuning import settings


@triton.jit
def swiglu_forward(gate_up_ptr, y_ptr, inner, BLOCK: tl.constexpr):
    """Compute BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < inner
    source = gate_up_ptr + row * 2 * inner + column
    gate = tl.load(source, mask=mask, other=0).to(tl.float32)
    up = tl.load(source + inner, mask=mask, other=0).to(tl.float32)
    y = gate / (1 + tl.exp(-gate)) * up
    tl.store(y_ptr + row * inner + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward(gate_up_ptr, grad_ptr, grad_gate_up_ptr, inner, BLOCK: tl.constexpr):
    """Compute, with s = sigmoid(gate): d up = dy gate s, d gate = dy up s (1 + gate (1 - s))."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < inner
    source = row * 2 * inner + column
    gate = tl.load(gate_up_ptr + source, mask=mask, other=0).to(tl.float32)
    up = tl.load(gate_up_ptr + source + inner, mask=mask, other=0).to(tl.float32)
    grad = tl.load(grad_ptr + row * inner + column, mask=mask, other=0).to(tl.float32)
    s = 1 / (1 + tl.exp(-gate))
    dtype = grad_gate_up_ptr.dtype.element_ty
    tl.store(grad_gate_up_ptr + source, (grad * up * s * (1 + gate * (1 - s))).to(dtype), mask=mask)
    tl.store(grad_gate_up_ptr + source + inner, (grad * gate * s).to(dtype), mask=mask)


def _launch(kernel: Any, rows: int, inner: int, like: Tensor, arguments: dict[str, Any]) -> Launch:
    chosen = settings("swiglu", inner, like.dtype, like.device)
    grid = (rows, triton.cdiv(inner, chosen["block"]))
    return Launch(kernel, grid, arguments | {"inner": inner}, {"BLOCK": chosen["block"]}, chosen["num_warps"], 1)


@op
def swiglu_rows(gate_up: Tensor) -> Tensor:
    """Return silu(first half) * second half of gate_up [..., 2 I]. `swiglu` has the gradient."""
    refuse_fp64(gate_up, "swiglu")
    inner = gate_up.shape[-1] // 2
    y = gate_up.new_empty((*gate_up.shape[:-1], inner))
    arguments = {"gate_up_ptr": gate_up.contiguous(), "y_ptr": y}
    _launch(swiglu_forward, y.numel() // inner, inner, y, arguments).run()
    return y


@op
def swiglu_rows_backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of gate_up [..., 2 I]."""
    inner = grad.shape[-1]
    gate_up = gate_up.contiguous()
    grad_gate_up = torch.empty_like(gate_up)
    arguments = {"gate_up_ptr": gate_up, "grad_ptr": grad.contiguous(), "grad_gate_up_ptr": grad_gate_up}
    _launch(swiglu_backward, grad.numel() // inner, inner, grad, arguments).run()
    return grad_gate_up


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> Tensor:
    return swiglu_rows_backward(*ctx.saved_tensors, grad)


swiglu_rows.register_autograd(_differentiate, setup_context=_remember)


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(first half) * second half of gate_up [..., 2 I]: [..., I]."""
    return swiglu_rows(gate_up)
