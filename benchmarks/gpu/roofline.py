"""Stage `roofline`: the element-wise kernels against copy bandwidth, torch.compile and Liger; and one core iteration.

Each implementation's time is divided into the bytes that the fused kernel has to move, so that all shares of the copy
bandwidth have one numerator. 4096 tokens of the 3.5B model in bfloat16.
"""

import itertools
import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.acceptance import fused
from benchmarks.gpu.machine import copy
from benchmarks.gpu.stage import Stage
from benchmarks.kernels import CASES, TOKENS, Case, fused_op, fused_traffic, liger_op, run_op
from recurrent_depth.model.attention import causal
from recurrent_depth.model.config import SHAPES
from recurrent_depth.model.layers import rotary_at, rotary_table
from recurrent_depth.model.ops import choose_ops, use_ops
from recurrent_depth.model.recurrence import RecurrentCore

CORE = ("eager", "compiled", "triton", "triton, compiled")


def run(stage: Stage) -> None:
    speed = (stage.measure("copy bandwidth", copy, stage) or {"bytes_per_second": math.nan})["bytes_per_second"]
    for name in ("triton", "compiled", "liger", "eager"):
        for case, backward in itertools.product(CASES, (False, True)):
            label = f"{case.name}, {'forward and backward' if backward else 'forward'}, {name}"
            stage.measure(label, operation, stage, case, backward, name, speed)
    for name in CORE:
        for gradient in (False, True):
            label = f"core iteration, {'forward and backward' if gradient else 'forward'}, {name}"
            stage.measure(label, core_iteration, stage, name, gradient)


def operation(stage: Stage, case: Case, backward: bool, name: str, speed: float) -> dict[str, Any]:
    """Return the median seconds of an operation, and the share of the copy bandwidth."""
    tokens, dtype = (8, torch.float32) if stage.toy else (TOKENS, torch.bfloat16)
    op = {
        "eager": lambda: case.plain,
        "compiled": lambda: case.plain if stage.toy else torch.compile(case.plain),
        "liger": lambda: liger_op(case),
        "triton": lambda: case.plain if stage.toy else fused_op(case),
    }[name]()  # fmt: skip
    if op is None:
        return {"not_available": True}
    torch._dynamo.reset()
    inputs = case.inputs(tokens, stage.device, dtype)
    seconds = stage.seconds(partial(run_op, op, inputs, backward), repeats=3 if stage.toy else 30)
    moved, _ = fused_traffic(case, tokens, dtype, backward)
    return {"seconds": seconds, "bytes": moved, "share_of_copy": moved / seconds / speed}


def core_iteration(stage: Stage, name: str, gradient: bool) -> dict[str, float]:
    """Return the median seconds of one iteration of the core, and its share of the dense bfloat16 peak."""
    config = SHAPES["tiny" if stage.toy else "huginn-3.5b"]
    tokens, dtype = (8, torch.float32) if stage.toy else (TOKENS, torch.bfloat16)
    with torch.device(stage.device):
        core, table = RecurrentCore(config).to(dtype), rotary_table(config)
        state, injection = (
            torch.randn(1, tokens, config.n_embd, dtype=dtype, requires_grad=gradient) for _ in range(2)
        )
        weight = (torch.randn(config.n_embd, config.n_embd) * config.init_std).to(dtype).requires_grad_(gradient)
        rotary = rotary_at(table.to(stage.device), torch.arange(tokens)[None])
    use_ops(core, choose_ops(fused(stage) if "triton" in name else "torch", stage.device))
    torch._dynamo.reset()
    for block in core:
        if "compiled" in name and not stage.toy:
            block.compile()
    leaves = [state, injection, weight, *core.parameters()]

    def iterate() -> None:
        with torch.set_grad_enabled(gradient):
            y = core.step(state, injection, lambda s, e: F.linear(s, weight) + e, rotary, causal, 0)
            if gradient:
                torch.autograd.grad(y, leaves, torch.ones_like(y))

    return {"seconds": stage.seconds(iterate, repeats=3 if stage.toy else 10)}
