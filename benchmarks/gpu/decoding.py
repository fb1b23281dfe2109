"""Stage `decoding`: time per token at the 3.5B shape, against the time to read what a token must read.

The floor is bytes over the measured copy bandwidth: weights once per iteration (the batch shares them), keys and values
of every cached token once per layer and iteration. `plain` launches one kernel after the other, `captured` replays CUDA
graphs; each with torch's operations and with the kernels.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.acceptance import fused
from benchmarks.gpu.machine import copy
from benchmarks.gpu.stage import Stage, synchronize
from recurrent_depth.generation.cache import RecurrentCache, cache_bytes
from recurrent_depth.generation.captured import CapturedToken
from recurrent_depth.generation.exits import ExitRule, Read, StateChange
from recurrent_depth.generation.request import Decoding, Requests
from recurrent_depth.generation.tokens import Tokens
from recurrent_depth.hf.quantization import quantize
from recurrent_depth.model.config import SHAPES, ModelConfig
from recurrent_depth.model.ops import choose_ops, use_ops
from recurrent_depth.model.transformer import RecurrentDepthModel

CONTEXT, TOKENS = 1024, 8
DEPTHS = (12, 6, 8, 9, 10, 14, 18, 24)
"""Iterations of the requests of a batch with replayed exits: random weights say nothing about convergence."""


class ReplayedExits:
    """Stop the token of each row after a given number of iterations, [B, 1]."""

    def __init__(self, depths: Tensor) -> None:
        self.depths = depths

    def remembers(self, vocab_size: int) -> int:
        return 1

    def converged(self, before: Tensor, after: Tensor, read: Read, memory: Tensor) -> tuple[Tensor, Tensor]:
        taken = memory.nan_to_num(0.0) + 1
        return taken[..., 0] >= self.depths, taken


def cases() -> list[dict[str, Any]]:
    """Return the measurements, the most important first."""
    best = {"way": "captured", "kernels": "triton", "budget": None, "exit": None, "quantize": None}
    found = [{**best, "batch": 1, "num_steps": r} for r in (32, 16, 8, 4)]
    found += [{**best, "batch": 1, "num_steps": 32, **change} for change in (
        {"way": "plain"}, {"kernels": "torch"}, {"way": "plain", "kernels": "torch"}, {"budget": 4}, {"budget": 1},
        {"exit": "never fires"}, {"exit": "replayed"},
    )]  # fmt: skip
    found += [{**best, "batch": batch, "num_steps": 32, "budget": 4} for batch in (8, 64, 2, 4, 16, 32)]
    found += [{**best, "batch": 8, "num_steps": r} for r in (32, 4, 8, 16)]
    found += [{**best, "batch": 64, "num_steps": r, "budget": 1} for r in (32, 8)]
    found += [{**best, "batch": 64, "num_steps": r} for r in (4, 8)]
    plain = {"batch": 64, "num_steps": 32, "budget": 4, "way": "plain"}
    found += [{**best, **plain, "kernels": kernels} for kernels in ("triton", "torch")]
    found += [{**best, "batch": 8, "num_steps": 32, "budget": 4, "exit": "replayed"}]
    if find_spec("torchao"):  # the last, because it changes the model
        found += [{**best, "batch": 1, "num_steps": 32, "quantize": "int8"}]
    return found


def run(stage: Stage) -> None:
    speed = (stage.measure("copy bandwidth", copy, stage) or {"bytes_per_second": math.nan})["bytes_per_second"]
    models: dict[str, RecurrentDepthModel] = {}
    for case in cases():
        name = ", ".join(f"{key} {value}" for key, value in case.items() if value is not None)
        stage.measure(name, measure, stage, case, speed, models)


def bytes_of_a_token(
    config: ModelConfig, batch: int, context: int, num_steps: int, weight_bytes: int = 2
) -> dict[str, int]:
    """Return the bytes that one pass of a batch reads: weights, and keys and values of `context` tokens per row."""
    D, block = config.n_embd, 4 * config.n_embd**2 + 3 * config.n_embd * config.intermediate_size
    step = D * D + config.n_layers_in_recurrent_block * block
    outer = config.unrolled_layers(0) * block + D * D
    entries = 2 * batch * context * D * config.unrolled_layers(num_steps)
    weights = weight_bytes * (num_steps * step + outer) + 2 * D * config.vocab_size  # the head stays in bfloat16
    return {"weight_bytes": weights, "key_value_bytes": 2 * entries}


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> RecurrentDepthModel:
    """Return a model with random weights, made on the device."""
    with torch.device("meta"):
        model = RecurrentDepthModel(config)
    model = model.to(dtype=dtype).to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=config.init_std)
    model.freqs_cis = torch.randn(model.freqs_cis.shape, device=device)
    return model.eval()


@torch.inference_mode()
def measure(stage: Stage, case: dict[str, Any], speed: float, models: dict[str, RecurrentDepthModel]) -> dict[str, Any]:
    """Return the median time of one new token per row after the context, and its share of the floor."""
    config = SHAPES["tiny" if stage.toy else "huginn-3.5b"]
    context, tokens = (8, 2) if stage.toy else (CONTEXT, TOKENS)
    if not models:
        models["model"] = random_model(config, stage.device, torch.float32 if stage.toy else torch.bfloat16)
    model, steps = models["model"], case["num_steps"]
    if case["quantize"] == "int8":
        quantize(model)
    use_ops(model, choose_ops(fused(stage) if case["kernels"] == "triton" else "torch", stage.device))
    dtype = model.lm_head.weight.dtype
    needed = cache_bytes(config, case["batch"], context + 256, steps, case["budget"], dtype)
    if not stage.toy and needed > 0.9 * torch.cuda.mem_get_info(stage.device)[0]:
        raise torch.OutOfMemoryError(f"the cache takes {needed} bytes")
    token = (captured_token if case["way"] == "captured" else plain_token)(stage, model, case, context, tokens)
    seconds = _median(token, stage, tokens)
    moved = bytes_of_a_token(config, case["batch"], context, steps, weight_bytes=1 if case["quantize"] else 2)
    floor = None if case["exit"] == "replayed" else sum(moved.values()) / speed
    return {
        **case, "context": context, **moved, "ms_per_token": 1e3 * seconds, "floor_ms": floor and 1e3 * floor,
        "share_of_floor": floor and floor / seconds, "cache_bytes": needed,
        "tokens_per_second": case["batch"] / seconds,
    }  # fmt: skip


def captured_token(
    stage: Stage, model: RecurrentDepthModel, case: dict[str, Any], context: int, tokens: int
) -> Callable[[], Any]:
    """Return a function that decodes one token per row with captured graphs (on a CPU, their regions)."""
    rules: dict[Any, ExitRule | None] = {
        None: None,
        "never fires": StateChange(0.0),  # all iterations, with the cost of the rule
        "replayed": ReplayedExits(torch.tensor(DEPTHS, device=stage.device).repeat(8)[: case["batch"], None]),
    }
    rule = rules[case["exit"]]
    options = Decoding(max_new_tokens=tokens + 4, num_steps=case["num_steps"], cache_budget=case["budget"], exit=rule)
    batch = case["batch"]
    requests = Requests(model, [[1] * context] * batch, options)
    token = CapturedToken(model, requests, requests.stopping[0])
    token.cache.entries.normal_()
    token.place([0] * batch, [context] * batch)
    if token.uses_graphs:
        token.capture()
    return lambda: token.run([1] * batch, [True] * batch)


def plain_token(
    stage: Stage, model: RecurrentDepthModel, case: dict[str, Any], context: int, tokens: int
) -> Callable[[], Any]:
    """Return a function that decodes one token per row with ordinary launches."""
    batch, steps = case["batch"], case["num_steps"]
    dtype = model.lm_head.weight.dtype
    cache = RecurrentCache(model.config, batch, context + tokens + 4, steps, case["budget"], dtype, stage.device)
    cache.entries.normal_()
    plain, columns = Tokens(model, cache), itertools.count(context)
    ids = torch.ones(batch, 1, dtype=torch.long)
    return lambda: plain.feed(ids, next(columns), steps)


def _median(token: Callable[[], Any], stage: Stage, repeats: int) -> float:
    """Return the median of the host's time from launch to result, after two calls."""
    times = []
    for _ in range(repeats + 2):
        synchronize(stage.device)
        began = time.perf_counter()
        token()
        synchronize(stage.device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])
