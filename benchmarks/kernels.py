"""The element-wise operations of a block: bytes moved, time, and share of what memory can give; and a core step.

    python -m benchmarks kernels        writes kernels_{cpu,gpu}.json; times are measured on a GPU alone

Bytes are counted at the 3.5B shape on any machine: for eager torch every operation's inputs and outputs, for
torch.compile what Inductor counts of the kernels it writes, for ours each tensor of a launch once. Times are medians.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import compile_fx, metrics
from torch._inductor import config as inductor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import write_result
from recurrent_depth.model import ops
from recurrent_depth.model.attention import causal
from recurrent_depth.model.config import SHAPES, ModelConfig
from recurrent_depth.model.layers import rotary_at, rotary_table
from recurrent_depth.model.ops import choose_ops, use_ops
from recurrent_depth.model.recurrence import RecurrentCore

D, H, INNER, K = 5280, 55, 17_920, 96  # of the 3.5B model
TOKENS = 4096
NOT_MEASURED = "not measured"

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
    Case("add_norm", _rows(D, D, -D), lambda *t: ops.add_norm(*t, 1e-6), "add_norm"),
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


def run(op: Op, inputs: list[Any], backward: bool) -> None:
    """Forward, and backward with gradients of ones that exist before."""
    if not backward:
        with torch.no_grad():
            op(*inputs)
        return
    outputs = [y for y in tree_leaves(op(*inputs)) if y.requires_grad]
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    torch.autograd.grad(outputs, leaves, [torch.empty_like(y) for y in outputs])


# Bytes


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
        run(op, inputs, backward)
    return traffic.bytes, traffic.kernels


def compiled_traffic(op: Op, inputs: list[Any], backward: bool) -> int:
    """By Inductor's own count of the kernels it generates."""
    torch._dynamo.reset()
    metrics.reset()
    compile_fx.inductor_metrics_log.setLevel(logging.INFO)  # without which nothing is counted
    compile_fx.inductor_metrics_log.propagate = False
    with inductor.patch(force_disable_caches=True):  # nor for a graph out of the cache
        run(torch.compile(op, fullgraph=True), inputs, backward)
    return metrics.num_bytes_accessed


def fused_traffic(case: Case, rows: int, dtype: torch.dtype, backward: bool) -> tuple[int, int]:
    """Each tensor of a launch once, and the parts of a weight's gradient again for their sum."""
    from recurrent_depth_kernels.launch import planned

    inputs = [x.to("meta") if isinstance(x, Tensor) else x for x in case.inputs(8, torch.device("cpu"), dtype)]
    inputs = [_lengthened(x, rows) for x in inputs]
    with planned("sm_90") as launches:
        run(fused_op(case), inputs, backward)
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


# Time


def median_seconds(action: Callable[[], Any]) -> float:
    """Of many runs on the GPU, its caches flushed between them."""
    import triton

    return triton.testing.do_bench(action, return_mode="median", rep=200) / 1e3


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.empty(2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source))


def time_table(device: torch.device, bandwidth: float) -> list[dict[str, Any]]:
    """Medians of each implementation in bfloat16, with the bytes that a fused kernel has to move in that time."""
    dtype = torch.bfloat16
    table = []
    for case in CASES:
        for backward in (False, True):
            inputs = case.inputs(TOKENS, device, dtype)
            needed, _ = fused_traffic(case, TOKENS, dtype, backward)
            variants: dict[str, Op | None] = {"eager": case.plain, "compiled": torch.compile(case.plain)}
            variants |= {"liger": liger_op(case), "triton": fused_op(case)}
            row: dict[str, Any] = {"op": case.name, "pass": "forward + backward" if backward else "forward"}
            for name, op in variants.items():
                if op is None:
                    row[name] = NOT_MEASURED
                    continue
                torch._dynamo.reset()
                seconds = median_seconds(partial(run, op, inputs, backward))
                row[name] = {
                    "seconds": seconds, "bytes_per_second": needed / seconds,
                    "share_of_copy": needed / seconds / bandwidth,
                }  # fmt: skip
            table.append(row)
            print(row, flush=True)
    return table


def core_step(device: torch.device) -> dict[str, float]:
    """Seconds of one step of the 3.5B core, forward and backward, 4096 tokens in bfloat16."""
    config = SHAPES["huginn-3.5b"]
    with torch.device(device):
        core, table = RecurrentCore(config).bfloat16(), rotary_table(config)
        shape, square = (1, TOKENS, config.n_embd), (config.n_embd, config.n_embd)
        state, injection = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        weight = (torch.randn(square) * config.init_std).bfloat16().requires_grad_()
        rotary = rotary_at(table, torch.arange(TOKENS)[None])
    leaves = [state, injection, weight, *core.parameters()]

    def step() -> None:
        adapt = lambda s, e: F.linear(s, weight) + e  # noqa: E731
        y = core.step(state, injection, adapt, rotary, causal, 0)
        torch.autograd.grad(y, leaves, torch.ones_like(y))

    found = {}
    for name in ("eager", "compiled", "triton", "triton, compiled"):
        torch._dynamo.reset()
        use_ops(core, choose_ops("triton" if "triton" in name else "torch", device))
        for block in core:
            block._compiled_call_impl = None
            if "compiled" in name:
                block.compile()
        found[name] = median_seconds(step)
        print(name, found[name], flush=True)
    return found


def main() -> None:
    payload: dict[str, Any] = {
        "shape": {"width": D, "heads": H, "inner": INNER, "tokens": TOKENS, "dtype": "bfloat16"},
        "traffic": traffic_table(),
        "copy_bytes_per_second": NOT_MEASURED,
        "times": NOT_MEASURED,
        "core_step_seconds": NOT_MEASURED,
    }
    if torch.cuda.is_available():
        device = torch.device("cuda")
        payload["copy_bytes_per_second"] = copy_bandwidth(device)
        payload["times"] = time_table(device, payload["copy_bytes_per_second"])
        payload["core_step_seconds"] = core_step(device)
    write_result(f"kernels_{'gpu' if torch.cuda.is_available() else 'cpu'}", payload)


if __name__ == "__main__":
    main()
