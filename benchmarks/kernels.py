"""The bytes that the element-wise operations of a block move: eager, compiled, and with the kernels.

    python -m benchmarks kernels        writes kernels_cpu.json

Bytes are counted at the 3.5B shape on any machine: for eager torch every operation's inputs and outputs, for
torch.compile what Inductor counts of the kernels it writes, for ours each tensor of a launch once. Times are measured
by the GPU suite (`benchmarks/gpu/roofline.py`).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._inductor import compile_fx, metrics
from torch._inductor import config as inductor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import write_result
from recurrent_depth.model import ops
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.layers import rotary_at, rotary_table

D, H, INNER, K = 5280, 55, 17_920, 96  # of the 3.5B model
TOKENS = 4096

Op = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """An operation at the 3.5B shape: its inputs, and who computes it."""

    name: str
    inputs: Callable[[int, torch.device, torch.dtype], list[Any]]
    plain: Op
    fused: str
    liger: str | None = None


def _rows(*widths: int) -> Callable[[int, torch.device, torch.dtype], list[Any]]:
    """Inputs [rows, width], or weights [width] where the width is negative."""

    def make(rows: int, device: torch.device, dtype: torch.dtype) -> list[Any]:
        shapes = [(rows, w) if w > 0 else (-w,) for w in widths]
        return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]

    return make


def _qkv(rows: int, device: torch.device, dtype: torch.dtype) -> list[Any]:
    table = rotary_table(ModelConfig(n_embd=K, n_heads=1, block_size=TOKENS)).to(device)
    qkv = torch.randn(1, rows, 3 * D, device=device).to(dtype).requires_grad_()
    bias = torch.zeros(2, 1, H, K, device=device, dtype=dtype, requires_grad=True)
    return [qkv, bias, *rotary_at(table, torch.arange(rows, device=device)[None]), H]


CASES = [
    Case("rms_norm", _rows(D, -D), lambda x, w: ops.rms_norm(x, w, 1e-6), "rms_norm", "rms_norm"),
    Case("add_norm", _rows(D, D, -D), lambda x, y, w: ops.add_norm(x, y, w, 1e-6), "add_norm"),
    Case("bias_rope", _qkv, ops.bias_rope, "bias_rope"),
    Case("swiglu", _rows(2 * INNER), ops.swiglu, "swiglu", "swiglu"),
]


def fused_op(case: Case) -> Op:
    import recurrent_depth_kernels

    op = getattr(recurrent_depth_kernels, case.fused)
    return (lambda *t: op(*t, 1e-6)) if "norm" in case.fused else op


def liger_op(case: Case) -> Op | None:
    """Liger's function of the same numbers, where it has one and is installed."""
    try:
        from liger_kernel.transformers import functional
    except ImportError:
        return None
    if case.liger == "rms_norm":
        return lambda x, w: functional.liger_rms_norm(x, w, 1e-6)
    if case.liger == "swiglu":
        return lambda x: functional.liger_swiglu(*(half.contiguous() for half in x.chunk(2, dim=-1)))
    return None


def run_op(op: Op, inputs: list[Any], backward: bool) -> None:
    """Forward, and backward with gradients of ones that exist before."""
    if not backward:
        with torch.no_grad():
            op(*inputs)
        return
    outputs = [y for y in tree_leaves(op(*inputs)) if y.requires_grad]
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    torch.autograd.grad(outputs, leaves, [torch.empty_like(y) for y in outputs])


class EagerTraffic(TorchDispatchMode):
    """Bytes that eager operations read and write, and how many kernels that takes; views and allocations are free."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.kernels = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not aliases and not any(word in func.__name__ for word in ("empty", "_unsafe_view", "detach")):
            self.kernels += 1
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.bytes += sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)
        return result


def eager_traffic(op: Op, inputs: list[Any], backward: bool) -> tuple[int, int]:
    with EagerTraffic() as traffic:
        run_op(op, inputs, backward)
    return traffic.bytes, traffic.kernels


def compiled_traffic(op: Op, inputs: list[Any], backward: bool) -> int:
    """By Inductor's own count of the kernels it generates."""
    torch._dynamo.reset()
    metrics.reset()
    compile_fx.inductor_metrics_log.setLevel(logging.INFO)  # without which nothing is counted
    compile_fx.inductor_metrics_log.propagate = False
    with inductor.patch(force_disable_caches=True):  # nor for a graph out of the cache
        run_op(torch.compile(op, fullgraph=True), inputs, backward)
    return metrics.num_bytes_accessed


def fused_traffic(case: Case, rows: int, dtype: torch.dtype, backward: bool) -> tuple[int, int]:
    """Each tensor of a launch once, and the parts of a weight's gradient again for their sum."""
    from recurrent_depth_kernels.launch import planned

    inputs = [x.to("meta") if isinstance(x, Tensor) else x for x in case.inputs(8, torch.device("cpu"), dtype)]
    inputs = [_lengthened(x, rows) for x in inputs]
    with planned("sm_90") as launches:
        run_op(fused_op(case), inputs, backward)
    total = 0
    for launch in launches:
        named = {id(x): (name, x) for name, x in launch.arguments.items() if isinstance(x, Tensor)}
        for name, x in named.values():
            times = 2 if name.startswith(("grad_weight", "grad_bias")) else 1  # parts that are summed afterwards
            total += times * min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
    return total, len(launches)


def _lengthened(x: Any, rows: int) -> Any:
    if not isinstance(x, Tensor) or 8 not in x.shape[:2]:
        return x
    shape = [rows if n == 8 and i < 2 else n for i, n in enumerate(x.shape)]
    return torch.empty(shape, dtype=x.dtype, device="meta", requires_grad=x.requires_grad)


def traffic_table() -> list[dict[str, Any]]:
    """Bytes at the 3.5B shape and 4096 tokens in bfloat16, counted at two lengths and carried on: all are linear."""
    rows = []
    for case in CASES:
        for backward in (False, True):

            def at(length: int, count: Callable[..., Any], case: Case = case, backward: bool = backward) -> Any:
                return count(case.plain, case.inputs(length, torch.device("cpu"), torch.bfloat16), backward)

            short, long = 32, 64
            (first, kernels), (second, _) = at(short, eager_traffic), at(long, eager_traffic)
            eager = first + (second - first) * (TOKENS - short) // (long - short)
            first, second = at(short, compiled_traffic), at(long, compiled_traffic)
            compiled = first + (second - first) * (TOKENS - short) // (long - short)
            fused, launches = fused_traffic(case, TOKENS, torch.bfloat16, backward)
            row = {
                "op": case.name, "pass": "forward + backward" if backward else "forward", "eager_bytes": eager,
                "eager_kernels": kernels, "compiled_bytes": compiled, "fused_bytes": fused, "fused_kernels": launches,
            }  # fmt: skip
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    shape = {"width": D, "heads": H, "inner": INNER, "tokens": TOKENS, "dtype": "bfloat16"}
    write_result("kernels_cpu", {"shape": shape, "traffic": traffic_table()})


if __name__ == "__main__":
    main()
