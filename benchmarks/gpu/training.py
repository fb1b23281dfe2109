"""Stage `training`: the training step of the 3.5B model, by implementation and recomputation.

One row of 4096 tokens, 24 iterations without and 8 with gradient, Huginn's optimizer on fp32 master weights. MFU leaves
recomputation out, HFU includes it; both are shares of the dense bfloat16 peak by the data sheet. The peak memory of
`recurrent-depth plan` stands beside the measured one.
"""

import dataclasses
import time
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.acceptance import fused, planned_peak
from benchmarks.gpu.machine import peak_flops
from benchmarks.gpu.stage import Stage, free_memory, synchronize
from recurrent_depth.model.config import SHAPES
from recurrent_depth.model.flops import training_flops
from recurrent_depth.model.ops import choose_ops, use_ops
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.training.config import OptimizerConfig, RuntimeConfig
from recurrent_depth.training.optimizer import build_optimizer
from recurrent_depth.training.parallel import blocks, build_model, start_processes

DEPTH = (24, 8)
LOSS_CHUNK = 4096
CASES = [
    ("eager", "step"), ("compiled", "step"), ("triton", "step"), ("triton, compiled", "step"),
    ("triton, compiled", "block"), ("triton, compiled", "none"), ("compiled", "none"),
]  # fmt: skip
"""(implementation, recomputation)"""


def run(stage: Stage) -> None:
    shape = "tiny" if stage.toy else "huginn-3.5b"
    step = TrainingStep(stage, shape, rows=1, tokens=16 if stage.toy else 4096)
    for variant, recompute in CASES:
        stage.measure(f"{shape}, {variant}, recompute {recompute}", step.measure, variant, recompute)
    del step
    free_memory()
    if stage.toy or find_spec("torchao"):
        step = TrainingStep(stage, shape, rows=1, tokens=16 if stage.toy else 4096, float8=not stage.toy)
        stage.measure(f"{shape}, float8, compiled, recompute none", step.measure, "float8, compiled", "none")
        del step
        free_memory()
    if not stage.toy:
        small = TrainingStep(stage, "small", rows=8, tokens=2048)
        for variant in ("eager", "triton, compiled"):
            stage.measure(f"small, {variant}, recompute none", small.measure, variant, "none")


class TrainingStep:
    """A model, its optimizer and one batch, measured under several implementations."""

    def __init__(self, stage: Stage, shape: str, rows: int, tokens: int, float8: bool = False) -> None:
        self.stage, self.shape, self.config = stage, shape, SHAPES[shape]
        self.rows, self.tokens = rows, tokens
        self.runtime = RuntimeConfig(
            device=stage.device.type, dtype="bfloat16", loss_chunk_size=LOSS_CHUNK, float8=float8
        )
        self.model: RecurrentDepthModel | None = None

    def _build(self) -> RecurrentDepthModel:
        """Return the model; it is built by the first measurement, so that a finished stage costs nothing."""
        if self.model is None:
            model = build_model(self.config, self.runtime, start_processes(self.runtime), seed=None)
            with torch.no_grad():
                for parameter in model.parameters():
                    local = parameter.to_local()  # type: ignore[attr-defined]
                    local.normal_(std=self.config.init_std) if local.ndim > 1 else local.fill_(1)
            self.optimizer = build_optimizer(model, OptimizerConfig(name="huginn", lr=1e-5))
            shape = (self.rows, self.tokens)
            self.ids = torch.randint(0, self.config.vocab_size, shape, device=self.stage.device)
            self.model = model
        return self.model

    def measure(self, variant: str, recompute: str) -> dict[str, Any]:
        """Return median seconds of a training step, its rates, and its peak memory."""
        model = self._build()
        kernels = fused(self.stage) if "triton" in variant else "torch"
        use_ops(model, choose_ops(kernels, self.stage.device))
        model.transformer.core_block.activation_checkpointing = recompute  # type: ignore[assignment]
        torch._dynamo.reset()
        for block in blocks(model):
            block._compiled_call_impl = None
            if "compiled" in variant and not self.stage.toy:
                block.compile()
        try:
            self._step(model)
            if not self.stage.toy:
                torch.cuda.reset_peak_memory_stats()
            times = [self._step(model) for _ in range(1 if self.stage.toy else 4)]
        finally:
            self.optimizer.zero_grad()
        return self._result(variant, recompute, median(times))

    def _step(self, model: RecurrentDepthModel) -> float:
        began = time.perf_counter()
        loss: Tensor | None = model(
            self.ids, targets=self.ids, num_steps=DEPTH, loss_chunk_size=self.runtime.loss_chunk_size
        ).loss
        assert loss is not None
        (loss / self.ids.numel()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.stage.device)
        return time.perf_counter() - began

    def _result(self, variant: str, recompute: str, seconds: float) -> dict[str, Any]:
        executed, useful = (
            self.rows * training_flops(self.config, self.tokens, *DEPTH, recomputed)
            for recomputed in (recompute, "none")
        )
        peak = peak_flops(self.stage)
        runtime = dataclasses.replace(
            self.runtime,
            activation_checkpointing=recompute,
            kernels=fused(self.stage) if "triton" in variant else "torch",
        )
        return {
            "shape": self.shape, "variant": variant, "rows": self.rows, "tokens": self.tokens, "depth": list(DEPTH),
            "recompute": recompute, "seconds": seconds, "tokens_per_second": self.rows * self.tokens / seconds,
            "executed_flops_per_second": executed / seconds, "mfu": peak and useful / seconds / peak,
            "hfu": peak and executed / seconds / peak,
            "peak_memory_bytes": None if self.stage.toy else torch.cuda.max_memory_allocated(),
            "planned_peak_bytes": planned_peak(self.config, runtime, "huginn", self.rows, self.tokens, DEPTH),
        }  # fmt: skip
