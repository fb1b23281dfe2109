"""Stage `kernels`: every kernel, compiled on the device at the 3.5B shape, against torch in fp64.

Memory that a kernel does not write is NaN, so that a missing write shows. Errors are relative to the largest value of
the reference. On a CPU the interpreted kernels run at small shapes, in fp32.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.stage import Stage
from recurrent_depth.model import ops
from recurrent_depth.model.ops import Ops, choose_ops

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
"""Largest error; in bfloat16 two roundings of the output."""


@dataclass(frozen=True)
class Shape:
    """rows N, width D, heads H, inner width I, cached tokens S."""

    rows: int
    width: int
    heads: int
    inner: int
    cached: int


HUGINN, TOY = Shape(4096, 5280, 55, 17_920, 1024), Shape(3, 96, 2, 40, 20)


def run(stage: Stage) -> None:
    if stage.toy:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is filled with NaN
    fused, shape = choose_ops("triton", stage.device), TOY if stage.toy else HUGINN
    for dtype in [torch.float32] if stage.toy else list(LIMIT):
        for name, case in CASES.items():
            stage.measure(f"{name}, {str(dtype).removeprefix('torch.')}", case, stage.device, dtype, shape, fused)
    stage.measure("truncated_normal", noise, stage.device, shape, fused)


def compare(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> dict[str, float]:
    """Return the largest error.

    Raises:
        AssertionError: if it is above the limit of the dtype, or a value is not finite.
    """
    worst = 0.0
    for n, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape, (n, a.shape, e.shape)
        assert a.isfinite().all(), f"tensor {n} holds values that are not finite: something was not written"
        error = ((a.double() - e).abs().max() / e.abs().max().clamp(min=1e-30)).item()
        assert error < LIMIT[dtype], f"tensor {n}: error {error:.2e}, limit {LIMIT[dtype]:.0e}"
        worst = max(worst, error)
    return {"error": worst, "limit": LIMIT[dtype]}


def with_gradients(fused: Callable[..., Any], plain: Callable[..., Any], inputs: list[Any]) -> tuple[list, list]:
    """Return outputs and gradients of the kernel, and of torch on the same numbers in fp64."""
    found = []
    for function, tensors in ((fused, inputs), (plain, [_to_float64(x) for x in inputs])):
        outputs = function(*tensors)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        leaves = [x for x in tensors if isinstance(x, Tensor) and x.requires_grad]
        generator = torch.Generator().manual_seed(9)
        directions = [torch.randn(y.shape, generator=generator).to(inputs[0]).to(y) for y in outputs]
        found.append([*outputs, *torch.autograd.grad(outputs, leaves, directions)])
    return found[0], found[1]


def _to_float64(x: Any) -> Any:
    return x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) and x.is_floating_point() else x


def _random(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def rms_norm(device: torch.device, dtype: torch.dtype, shape: Shape, fused: Ops) -> dict[str, float]:
    x, weight = _random((shape.rows, shape.width), device, dtype), _random((shape.width,), device, dtype)
    return compare(*with_gradients(fused.rms_norm, ops.rms_norm, [x, weight, 1e-6]), dtype)


def add_norm(device: torch.device, dtype: torch.dtype, shape: Shape, fused: Ops) -> dict[str, float]:
    x, y = (_random((shape.rows, shape.width), device, dtype) for _ in range(2))
    weight = _random((shape.width,), device, dtype)

    def norm_of_sum(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> Tensor:  # the kernel rounds the sum as well
        return ops.rms_norm((x + y).to(dtype).double(), weight, eps)

    return compare(*with_gradients(fused.add_norm, norm_of_sum, [x, y, weight, 1e-6]), dtype)


def swiglu(device: torch.device, dtype: torch.dtype, shape: Shape, fused: Ops) -> dict[str, float]:
    gate_up = _random((shape.rows, 2 * shape.inner), device, dtype)
    return compare(*with_gradients(fused.swiglu, ops.swiglu, [gate_up]), dtype)


def bias_rope(device: torch.device, dtype: torch.dtype, shape: Shape, fused: Ops) -> dict[str, float]:
    qkv = _random((1, shape.rows, 3 * shape.width), device, dtype)
    bias = _random((2, 1, shape.heads, shape.width // shape.heads), device, dtype)
    cos, sin = (torch.randn(1, shape.rows, shape.width // shape.heads, device=device) for _ in range(2))
    return compare(*with_gradients(fused.bias_rope, ops.bias_rope, [qkv, bias, cos, sin, shape.heads]), dtype)


def rope_into_cache(device: torch.device, dtype: torch.dtype, shape: Shape, fused: Ops) -> dict[str, float]:
    """Compare q and the cache after the write, with one row that must not write."""
    B, R, H, K = 3, 4, shape.heads, shape.width // shape.heads
    qkv = torch.randn(B, 1, 3 * shape.width, device=device, dtype=dtype)
    q_bias, k_bias = (torch.randn(H, K, device=device, dtype=dtype) for _ in range(2))
    cos, sin = (torch.randn(B, 1, K, device=device) for _ in range(2))
    entries = torch.randn(R, 2, B, H, shape.cached, K, device=device, dtype=dtype)
    steps, columns = torch.tensor([0, 5, 2], device=device), torch.tensor([3, 7, shape.cached - 1], device=device)
    active = torch.tensor([[True], [True], [False]], device=device)
    exact = entries.double()
    q = fused.rope_into_cache(qkv, q_bias, k_bias, cos, sin, entries, steps, columns, active, H)
    wanted = ops.rope_into_cache(
        qkv.double(), q_bias.double(), k_bias.double(), cos.double(), sin.double(), exact, steps, columns, active, H
    )
    return compare([q, entries], [wanted, exact], dtype)


def decode_attention(device: torch.device, dtype: torch.dtype, shape: Shape, fused: Ops) -> dict[str, float]:
    """Compare at a full cache and at budgets of 4 and 1, with tokens that stopped at different iterations."""
    worst = {"error": 0.0, "limit": LIMIT[dtype]}
    H, K, S = shape.heads, shape.width // shape.heads, shape.cached
    for B, R, T in ((1, 32, 1), (8, 4, 1), (16, 1, 1), (2, 4, 3)):
        q = torch.randn(B, H, T, K, device=device, dtype=dtype)
        entries = torch.randn(R, 2, B, H, S, K, device=device, dtype=dtype)
        depths = torch.randint(1, 33, (B, S), device=device)
        steps = torch.randint(0, 32, (B,), device=device)
        lengths = torch.randint(S // 2, S + 1, (B,), device=device)
        starts = torch.randint(0, S // 4, (B,), device=device)
        lanes = torch.randperm(B, device=device)
        for released in (False, True):
            rest = (depths, lanes, starts, lengths, steps, released)
            actual = fused.decode_attention(q, entries, *rest)
            expected = ops.decode_attention(q.double(), entries.double(), *rest)
            worst["error"] = max(worst["error"], compare([actual], [expected], dtype)["error"])
    return worst


def noise(device: torch.device, shape: Shape, fused: Ops) -> dict[str, float]:
    """Compare the noise of the kernel on the device with torch on the CPU: equal bits, normals to 4e-6."""
    rows, positions = torch.arange(2), torch.arange(shape.rows)[None]
    expected = ops.truncated_normal(rows, positions, shape.width, seed=3, step=4)
    actual = fused.truncated_normal(rows.to(device), positions.to(device), shape.width, seed=3, step=4)
    error = (actual.cpu() - expected).abs().max().item()
    assert error < 4e-6, f"error {error:.2e}, limit 4e-6"
    return {"error": error, "limit": 4e-6}


CASES = {case.__name__: case for case in (rms_norm, add_norm, swiglu, bias_rope, rope_into_cache, decode_attention)}
