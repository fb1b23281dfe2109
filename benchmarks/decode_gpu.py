"""Decoding at the 3.5B shape with random weights: time a token against the time to read what a token must read.

    python -m benchmarks decode_gpu                  # on a GPU; writes results/decode_gpu.json
    python -m benchmarks decode_gpu --shape tiny --context 16 --tokens 3 --device cpu      # whether it runs

The floor is bytes over bandwidth: weights once a step (the batch shares them), keys and values of every cached token
once a layer and step. Bandwidth is that of a large copy on the same GPU. `ways` are the engine's: plain (one launch
after the other) and captured (CUDA graphs), each with torch's operations and with the kernels. Without a GPU the
floor at a data sheet's bandwidth is printed, and nothing is kept.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import write_result
from recurrent_depth.generation.cache import RecurrentCache, cache_bytes
from recurrent_depth.generation.captured import CapturedToken
from recurrent_depth.generation.request import Decoding, Requests
from recurrent_depth.generation.tokens import Tokens
from recurrent_depth.model.config import SHAPES, ModelConfig
from recurrent_depth.model.ops import choose_ops, use_ops
from recurrent_depth.model.transformer import RecurrentDepthModel

DATA_SHEET = {"H200": 4.8e12, "MI300X": 5.3e12}
"""Bytes per second of memory."""

NOT_MEASURED = "not measured"
WAYS = [(way, kernels) for kernels in ("torch", "triton") for way in ("plain", "captured")]


def bytes_of_a_token(config: ModelConfig, batch: int, context: int, num_steps: int, element: int = 2) -> dict[str, int]:
    """Bytes one decode pass of a batch reads: weights, and keys and values of `context` cached tokens a row."""
    D, block = config.n_embd, 4 * config.n_embd**2 + 3 * config.n_embd * config.intermediate_size
    step = D * D + config.n_layers_in_recurrent_block * block
    outer = config.unrolled_layers(0) * block + D * D + D * config.vocab_size
    entries = 2 * batch * context * D * config.unrolled_layers(num_steps)
    return {"weights": element * (num_steps * step + outer), "keys_and_values": element * entries}


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> RecurrentDepthModel:
    with torch.device("meta"):
        model = RecurrentDepthModel(config)
    model = model.to(dtype=dtype).to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=config.init_std)
    return model.eval()


def median_seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def bandwidth(device: torch.device, size: int = 2**31) -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), device, 10)


@torch.inference_mode()
def token_seconds(
    model: RecurrentDepthModel, way: str, batch: int, context: int, num_steps: int, budget: int | None, tokens: int
) -> float | None:
    """Median time of one pass with one new token a row, after `context` cached ones; None: the cache does not fit."""
    device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
    new = tokens + 4
    shape = (model.config, batch, context + new, num_steps, budget, dtype)
    if device.type == "cuda" and cache_bytes(*shape) > 0.9 * torch.cuda.mem_get_info(device)[0]:
        return None
    if way == "captured":
        options = Decoding(max_new_tokens=new, num_steps=num_steps, cache_budget=budget)
        requests = Requests(model, [[1] * context] * batch, options)
        token = CapturedToken(model, requests, requests.stopping[0])
        token.cache.entries.normal_()
        token.place([0] * batch, [context] * batch)
        if device.type == "cuda":
            token.capture()
        return median_seconds(lambda: token.run([1] * batch, [True] * batch), device, tokens)
    cache = RecurrentCache(*shape, device)
    cache.entries.normal_()
    plain, columns = Tokens(model, cache), itertools.count(context)
    ids = torch.ones(batch, 1, dtype=torch.long)
    return median_seconds(lambda: plain.feed(ids, next(columns), num_steps), device, tokens)


def measure(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    config = SHAPES[args.shape]
    measured = device.type == "cuda" or args.device == "cpu"
    model = random_model(config, device, getattr(torch, args.dtype)) if measured else None
    speed = bandwidth(device) if device.type == "cuda" else DATA_SHEET["H200"]
    rows = []
    print("| batch | budget | " + " | ".join(f"{way}, {kernels}" for way, kernels in WAYS) + " | floor ms | share |")
    print("|---" * (len(WAYS) + 4) + "|")
    for batch in args.batch:
        for budget in (None, 4):
            moved = bytes_of_a_token(config, batch, args.context, args.num_steps)
            row: dict[str, Any] = {
                "batch": batch, "context": args.context, "num_steps": args.num_steps, "budget": budget, **moved,
                "floor_ms": 1e3 * sum(moved.values()) / speed,
            }  # fmt: skip
            for way, kernels in WAYS:
                row[f"{way}_{kernels}_ms"] = NOT_MEASURED
                if model is not None and (kernels == "torch" or device.type == "cuda"):
                    use_ops(model, choose_ops(kernels, device))
                    seconds = token_seconds(model, way, batch, args.context, args.num_steps, budget, args.tokens)
                    row[f"{way}_{kernels}_ms"] = "does not fit" if seconds is None else 1e3 * seconds
            best = row["captured_triton_ms"]
            row["share_of_floor"] = best if isinstance(best, str) else row["floor_ms"] / best
            rows.append(row)
            times = [row[f"{way}_{kernels}_ms"] for way, kernels in WAYS] + [row["floor_ms"], row["share_of_floor"]]
            cells = [x if isinstance(x, str) else f"{x:.2f}" for x in times]
            print(f"| {batch} | {budget or 'all'} | " + " | ".join(cells) + " |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="huginn-3.5b")
    parser.add_argument("--num-steps", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto", help="cpu: measure there; nothing is kept")
    args = parser.parse_args()
    device = torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else "cpu")
    rows = measure(args, device)
    if device.type == "cuda":
        write_result("decode_gpu", {"shape": args.shape, "dtype": args.dtype, "rows": rows})


if __name__ == "__main__":
    main()
