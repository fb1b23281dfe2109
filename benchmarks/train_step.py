"""Training step: tokens/s, executed FLOP/s and peak memory at a few shapes and depths, eager and compiled per block.

python -m benchmarks train_step            # CPU
python -m benchmarks train_step            # on a GPU: the small and the 3.5B shape in bfloat16

The 3.5B shape: one row of 4096 tokens, r = 32, k = 8, steps recomputed, Huginn's optimizer on fp32 master weights. MFU
leaves recomputation out, HFU includes it; both are shares of the dense bfloat16 peak. The plan's peak of memory stands
beside the measured one.
"""

import argparse
import dataclasses
import resource
import statistics
import time
from typing import Any

import torch

from benchmarks.common import write_result
from recurrent_depth.data.config import DataConfig, PackedDataConfig
from recurrent_depth.model.config import SHAPES, ModelConfig
from recurrent_depth.model.flops import PEAK_FLOPS, training_flops
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.planning.pretraining import Job, memory
from recurrent_depth.training.config import OptimizerConfig, RunConfig, RuntimeConfig
from recurrent_depth.training.optimizer import build_optimizer
from recurrent_depth.training.parallel import Ranks, blocks, build_model, start_processes

LOSS_CHUNK = 4096
WIDTH_128 = ModelConfig(n_embd=128, n_heads=4, intermediate_size=352, vocab_size=4096)


def cases(gpu: bool) -> list[tuple[str, ModelConfig, int, int, tuple[int, int], str]]:
    """(name, shape, rows, tokens, depth, recomputation)"""
    if not gpu:
        return [
            ("tiny", SHAPES["tiny"], 32, 17, (4, 4), "none"),
            ("tiny", SHAPES["tiny"], 32, 17, (12, 4), "none"),
            ("width-128", WIDTH_128, 16, 128, (4, 4), "none"),
        ]
    return [
        ("small", SHAPES["small"], 8, 2048, (8, 8), "none"),
        ("huginn-3.5b", SHAPES["huginn-3.5b"], 1, 4096, (24, 8), "step"),
    ]


def build(
    config: ModelConfig, runtime: RuntimeConfig, ranks: Ranks
) -> tuple[RecurrentDepthModel, torch.optim.Optimizer]:
    model = build_model(config, runtime, ranks, seed=0)
    return model, build_optimizer(model, OptimizerConfig(name="huginn" if ranks.device.type == "cuda" else "adamw"))


def planned_peak(config: ModelConfig, runtime: RuntimeConfig, rows: int, tokens: int, depth: tuple[int, int]) -> int:
    """Of one model on one GPU; with eager and compiled copies beside each other, each has as much."""
    fixed = dataclasses.replace(
        config, sampling_scheme="fixed", mean_recurrence=sum(depth), mean_backprop_depth=depth[1]
    )
    run = RunConfig(
        out="unused",
        data=DataConfig(packed=PackedDataConfig(path="unused")),
        model=fixed,
        batch_size=rows,
        runtime=runtime,
    )
    return sum(memory(Job(run, 1, tokens)).values())


def one_step(model: RecurrentDepthModel, optimizer: torch.optim.Optimizer, ids: torch.Tensor, depth: Any) -> float:
    began = time.perf_counter()
    model(ids, targets=ids, num_steps=depth, loss_chunk_size=LOSS_CHUNK).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    rows = []
    for name, config, batch, tokens, depth, recompute in cases(gpu):
        runtime = RuntimeConfig(
            activation_checkpointing=recompute, threads=None if gpu else 1, loss_chunk_size=LOSS_CHUNK
        )
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        ranks = start_processes(runtime)
        ids = torch.randint(0, config.vocab_size, (batch, tokens), device=ranks.device)
        compiled = dataclasses.replace(runtime, compile=True)
        variants = {"eager": build(config, runtime, ranks)}
        if name != "huginn-3.5b":  # two copies of the large model do not fit beside each other
            variants["compiled"] = build(config, compiled, ranks)
        times: dict[str, list[float]] = {variant: [] for variant in variants}
        for _ in range(options.repeats + 3):
            for variant, (model, optimizer) in variants.items():
                times[variant].append(one_step(model, optimizer, ids, depth))
        if name == "huginn-3.5b":
            model, optimizer = variants["eager"]
            for block in blocks(model):
                block.compile()
            times["compiled"] = [one_step(model, optimizer, ids, depth) for _ in range(options.repeats + 3)]
        flops = batch * training_flops(config, tokens, *depth, recompute)
        useful = batch * training_flops(config, tokens, *depth)
        peak = next((value for chip, value in PEAK_FLOPS.items() if gpu and chip in torch.cuda.get_device_name()), None)
        for variant, seconds in times.items():
            median = statistics.median(seconds[3:])
            row = {
                "shape": name, "variant": variant, "rows": batch, "tokens": tokens, "depth": depth,
                "recompute": recompute, "seconds": median, "tokens_per_second": round(batch * tokens / median),
                "executed_flops_per_second": flops / median,
                "peak_memory_bytes": torch.cuda.max_memory_allocated() if gpu else None,
                "planned_peak_bytes": planned_peak(config, runtime, batch, tokens, depth) if gpu else None,
                "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "hfu": flops / median / peak if peak else None, "mfu": useful / median / peak if peak else None,
            }  # fmt: skip
            rows.append(row)
            print(row)
        del variants
    write_result("train_step_gpu" if gpu else "train_step_cpu", {"rows": rows})


if __name__ == "__main__":
    main()
