"""Start several ranks on this machine, and configurations small enough to train in a second."""

import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from recurrent_depth.data.config import DataConfig, TaskDataConfig
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.runs import checkpoints
from recurrent_depth.training.config import (
    CheckpointConfig,
    OptimizerConfig,
    RunConfig,
    RuntimeConfig,
    ValidationConfig,
)
from recurrent_depth.training.parallel import Ranks

ONE_RANK = Ranks(0, 1, torch.device("cpu"))


def small_run(out: Path, **changes: Any) -> RunConfig:
    """Twelve steps of a tiny model on the shell game."""
    defaults: dict[str, Any] = {
        "data": DataConfig(task=TaskDataConfig(name="shell_game", min_length=2, max_length=8)),
        "model": ModelConfig(
            n_embd=32, n_heads=2, intermediate_size=64, vocab_size=64, block_size=32, mean_recurrence=4,
            mean_backprop_depth=2,
        ),
        "steps": 12,
        "batch_size": 8,
        "micro_steps": 2,
        "log_every": 1,
        "optimizer": OptimizerConfig(lr=2e-3, warmup_steps=3, cooldown_steps=min(3, changes.get("steps", 3))),
        "runtime": RuntimeConfig(device="cpu", threads=1),
        "checkpoint": CheckpointConfig(every=4),
        "validation": ValidationConfig(every=6, rows=8, num_steps=(1, 4)),
    }  # fmt: skip
    return RunConfig(out=str(out), **(defaults | changes))


def lively_model(vocab_size: int = 50, block_size: int = 96) -> RecurrentDepthModel:
    """A random model in fp64 with weights large enough that tokens differ and converge at different steps."""
    config = ModelConfig(
        n_embd=32, n_heads=2, intermediate_size=48, vocab_size=vocab_size, block_size=block_size,
        n_layers_in_recurrent_block=2,
    )  # fmt: skip
    model = RecurrentDepthModel(config).double()
    model.initialise(seed=3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1.0 if "norm" in name or "ln_f" in name else 2.5)
    return model.eval()


def losses(run: Path) -> list[float]:
    """The training loss of every step of a run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["type"] == "train"]


def outcome(folder: str | Path, action: Callable[..., Any], *args: Any) -> None:
    """Call `action`; what it raises is written to FOLDER/outcome-RANK.txt, and the process fails."""
    try:
        action(*args)
    except Exception as error:
        (Path(folder) / f"outcome-{os.environ['RANK']}.txt").write_text(f"{type(error).__name__}: {error}")
        raise


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of the newest checkpoint, by shard file and name."""
    tensors = {}
    for path in sorted(checkpoints(run)[-1].glob("*.safetensors")):
        tensors |= {f"{path.name}:{name}": value for name, value in load_file(path).items()}
    return tensors


def run_ranks(target: Callable[..., None], world_size: int, *args: Any, timeout: float = 240) -> list[int]:
    """Run `target(*args)` in `world_size` processes, as torchrun would; one that dies takes the others with it.

    Returns the exit codes. Processes fork from a server that has imported the trainer once, so a start is cheap.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["recurrent_depth.training.launch", "support"])
    port = _free_port()
    processes = [
        context.Process(target=_enter, args=(rank, world_size, port, target, args)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    while any(p.is_alive() for p in processes):
        if any(p.exitcode not in (0, None) for p in processes) or time.monotonic() > deadline:
            time.sleep(0.2)
            for p in processes:
                p.kill()
            break
        time.sleep(0.02)
    for p in processes:
        p.join()
    return [int(p.exitcode or 0) for p in processes]


def _enter(rank: int, world_size: int, port: int, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(
        OMP_NUM_THREADS="1",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    target(*args)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
