"""What a training step sends, holds and takes on 1, 2 and 4 ranks, beside the plan; and the plan beside Huginn's run.

    PYTHONPATH=tests python -m benchmarks scaling

Ranks are processes on this machine that talk over gloo: times say how the code behaves, not how a GPU cluster does.
"""

import dataclasses
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import write_result
from collectives import counted
from live_memory import LiveMemory
from recurrent_depth.data.config import DataConfig, TaskDataConfig
from recurrent_depth.model.config import SHAPES, ModelConfig
from recurrent_depth.model.flops import training_flops
from recurrent_depth.planning.devices import DEVICES
from recurrent_depth.planning.pretraining import Job, communication, memory, throughput
from recurrent_depth.training.config import OptimizerConfig, RunConfig, RuntimeConfig
from recurrent_depth.training.optimizer import local_shard
from recurrent_depth.training.parallel import start_processes
from recurrent_depth.training.trainer import Trainer
from support import run_ranks

TOKENS = 64
CORES = len(os.sched_getaffinity(0))
CASES = {  # name: (ranks, shard_size, reshard_after_forward)
    "one process": (1, None, False),
    "FSDP, 2 ranks": (2, None, False),
    "FSDP, 2 ranks, weights freed": (2, None, True),
    "replicated, 2 ranks": (2, 1, False),
    "FSDP, 4 ranks": (4, None, False),
    "hybrid, 4 ranks": (4, 2, False),
}


def run_config(out: str, shard_size: int | None, reshard: bool, depth: int) -> RunConfig:
    """A step of 16 rows of 64 tokens in two micro-steps, in fp32, at a fixed depth."""
    model = ModelConfig(
        n_embd=128, n_heads=4, intermediate_size=352, vocab_size=1024, n_layers_in_recurrent_block=2,
        block_size=TOKENS, mean_recurrence=depth, mean_backprop_depth=4, sampling_scheme="fixed",
    )  # fmt: skip
    runtime = RuntimeConfig(
        device="cpu", dtype="float32", threads=1, shard_size=shard_size, reshard_after_forward=reshard
    )
    data = DataConfig(task=TaskDataConfig(name="shell_game", min_length=TOKENS - 1, max_length=TOKENS - 1))
    return RunConfig(
        out=out, data=data, model=model, batch_size=16, micro_steps=2, runtime=runtime,
        optimizer=OptimizerConfig(lr=1e-4),
    )  # fmt: skip


def measure(config: RunConfig, repeats: int, out: Path) -> None:
    """In every rank: times of steps, then the collectives of one, then the peak of another."""
    trainer = Trainer(config, start_processes(config.runtime))
    trainer.train_step()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        trainer.train_step()
        seconds.append(time.perf_counter() - began)
    with counted() as counts:
        trainer.train_step()
    moments = [value for p in trainer.parameters for value in trainer.optimizer.state[p].values()]
    with LiveMemory(*(local_shard(tensor.detach()) for tensor in [*trainer.parameters, *moments])) as live:
        trainer.train_step()
    if trainer.ranks.is_main:
        out.write_text(json.dumps({"seconds": seconds, "counts": counts, "peak_bytes": live.peak}))


def measured(config: RunConfig, ranks: int, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        assert run_ranks(measure, ranks, config, repeats, out) == [0] * ranks
        return json.loads(out.read_text())


def row(name: str, depth: int, flops_per_second: float | None, repeats: int = 5) -> dict[str, Any]:
    """One case: what was measured, and what the plan says. Compute is planned from the speed of one process."""
    ranks, shard_size, reshard = CASES[name]
    config = run_config("unused", shard_size, reshard, depth)
    job = Job(config, ranks, TOKENS)
    result = measured(config, ranks, repeats)
    counts, planned = result["counts"], communication(job)
    flops = config.batch_size * training_flops(config.model, TOKENS, depth - 4, 4)
    at_once = min(ranks, CORES)
    return {
        "case": name, "ranks": ranks, "num_steps": depth,
        "gathers": counts.get("gathers", 0), "reduces": counts.get("reduces", 0),
        "gather_bytes": counts.get("all_gather_bytes", 0), "planned_gather_bytes": planned["gather"],
        "reduce_scatter_bytes": counts.get("reduce_scatter_bytes", 0),
        "planned_reduce_scatter_bytes": planned["reduce_scatter"],
        "all_reduce_bytes": counts.get("all_reduce_bytes", 0), "planned_all_reduce_bytes": planned["all_reduce"],
        "peak_bytes": result["peak_bytes"], "planned_peak_bytes": sum(memory(job).values()),
        "seconds": statistics.median(result["seconds"]), "all_seconds": result["seconds"],
        "planned_compute_seconds": flops / flops_per_second / at_once if flops_per_second else None,
        "flops": flops,
    }  # fmt: skip


def published_run() -> dict[str, Any]:
    """Huginn's run: 4096 MI250X dies, ZeRO in a node, a row of 4096 tokens a die, steps recomputed.

    Inputs are public and fixed before the prediction: the speed on one node (108.75 TFLOP/s a die, recomputation
    included), the data sheet's bandwidths, 70% of them reached, nothing hidden behind compute. Published at 4096 dies:
    52 to 64 TFLOP/s a die.
    """
    runtime = RuntimeConfig(shard_size=8, activation_checkpointing="step")
    config = dataclasses.replace(
        run_config("unused", 8, False, 8), model=SHAPES["huginn-3.5b"], batch_size=4096, micro_steps=1, runtime=runtime
    )
    device, one_node = DEVICES["mi250x"], 108.75e12
    speed = throughput(Job(config, 4096, 4096), device, one_node / device.peak)
    low, high = (4096 * published / speed.executed for published in (52e12, 64e12))
    return {
        "predicted_tokens_per_second": speed.tokens_per_second,
        "predicted_flops_per_second_a_die": speed.tokens_per_second * speed.executed / 4096,
        "predicted_compute_seconds": speed.compute_seconds,
        "predicted_communication_seconds": speed.communication_seconds,
        "published_tokens_per_second": [low, high],
        "error": [speed.tokens_per_second / high - 1, speed.tokens_per_second / low - 1],
        "predicted_days_of_795B_tokens": 795e9 / speed.tokens_per_second / 86_400,
    }


def main() -> None:
    first = row("one process", 8, None)
    rate = first["flops"] / first["seconds"]
    rows = [first] + [row(name, 8, rate) for name in list(CASES)[1:]] + [row("FSDP, 2 ranks", 24, rate)]
    for entry in rows:
        print({key: value for key, value in entry.items() if key not in ("all_seconds", "flops")})
    published = published_run()
    print(published)
    machine = {"cores_used": CORES, "load_average": os.getloadavg()[1]}
    write_result("scaling", {**machine, "tokens": TOKENS, "rows": rows, "published_run": published})


if __name__ == "__main__":
    main()
