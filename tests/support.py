"""Helpers: several ranks on this machine, configurations that train in a second, and models to decode with."""

import errno
import io
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recurrent_depth.data.config import DataConfig, TaskDataConfig
from recurrent_depth.generation.config import Mode
from recurrent_depth.generation.engine import Decoder
from recurrent_depth.generation.request import DecodableModel, Decoded, Decoding
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
from recurrent_depth.training.trainer import Trainer

QUESTION, ANSWER = "how many apples are there?", "there are 7 apples."  # of the chat models in conftest.py
ONE_RANK = Ranks(0, 1, torch.device("cpu"))


def small_run(out: Path, **changes: Any) -> RunConfig:
    """Return a run of twelve training steps of a tiny model on the shell game."""
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


LLAMA_LIKE: dict[str, Any] = {
    "n_kv_heads": 1, "head_size": 12, "qk_bias": False, "qkv_bias": True, "qk_norm": "head", "block": "pre",
    "ln_f_before_coda": False, "embed_multiplier": 1.0,
}  # fmt: skip
"""Fields of a model with grouped heads, biases and norms of q and k, as converted dense models have them."""


def lively_model(vocab_size: int = 50, block_size: int = 96, scale: float = 2.5, **shape: Any) -> RecurrentDepthModel:
    """Return a random model in fp64 with large weights, so that tokens differ and converge at different iterations."""
    config = ModelConfig(
        n_embd=32, n_heads=2, intermediate_size=48, vocab_size=vocab_size, block_size=block_size,
        n_layers_in_recurrent_block=2, **shape,
    )  # fmt: skip
    model = RecurrentDepthModel(config).double()
    model.initialise(seed=3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1.0 if "norm" in name or "ln_f" in name else scale)
    return model.eval()


def decode(
    model: DecodableModel,
    prompts: Sequence[Sequence[int]],
    options: Decoding | None = None,
    mode: Mode | None = None,
    **given: Any,
) -> Decoded:
    """Continue prompts with a new decoder."""
    return Decoder(model, mode).generate(prompts, options, **given)


def losses(run: Path) -> list[float]:
    """Return the loss of every training step of a run."""
    return [record["loss"] for record in records(run)]


def records(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Return the records of a kind in metrics.jsonl of a run: `train`, `validation` or `rewind`."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if record["type"] == kind]


@contextmanager
def changed_loss(change: Callable[[Trainer, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Pass the loss of every micro-step of training in this process through `change(trainer, loss)`."""
    train_step, forward = Trainer.train_step, RecurrentDepthModel.forward
    training: list[Trainer] = []

    def watched_step(self: Trainer) -> dict[str, float]:
        training.append(self)
        try:
            return train_step(self)
        finally:
            training.pop()

    def changed_forward(self: RecurrentDepthModel, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if training and output.loss is not None:
            output.loss = change(training[-1], output.loss)
        return output

    Trainer.train_step, RecurrentDepthModel.forward = watched_step, changed_forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer.train_step, RecurrentDepthModel.forward = train_step, forward  # type: ignore[method-assign]


def assert_equal_runs(actual: Path, expected: Path) -> None:
    """Assert that losses, weights and moments of two runs are equal bit for bit."""
    assert losses(actual) == losses(expected)
    tensors, others = final_tensors(actual), final_tensors(expected)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in others)


def full_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make opening files of this name for writing fail as on a full disk."""
    original = io.open

    def full(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if name in str(file) and mode[0] in "wa":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return original(file, mode, *args, **kwargs)

    monkeypatch.setattr(io, "open", full)
    monkeypatch.setattr("builtins.open", full)


def outcome(folder: str | Path, action: Callable[..., Any], *args: Any) -> None:
    """Call `action`; if it raises, write the error to FOLDER/outcome-RANK.txt and raise it again."""
    try:
        action(*args)
    except Exception as error:
        (Path(folder) / f"outcome-{os.environ['RANK']}.txt").write_text(f"{type(error).__name__}: {error}")
        raise


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Return weights and moments of the newest checkpoint, by shard file and name."""
    tensors: dict[str, torch.Tensor] = {}
    newest = checkpoints(run)[-1]
    for path in sorted(newest.rglob("*.safetensors")):
        tensors |= {f"{path.relative_to(newest)}:{name}": value for name, value in load_file(path).items()}
    return tensors


def run_ranks(target: Callable[..., None], world_size: int, *args: Any, timeout: float = 240) -> list[int]:
    """Run `target(*args)` in `world_size` processes, as torchrun would, and return the exit codes.

    When one process dies, the others are ended. Processes fork from a server that has already imported the trainer, so
    starting them is fast.
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


_ABSENT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("recurrent_depth", "recurrent_depth_kernels"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
"""


def run_without_our_package(script: str, scratch: Path) -> str:
    """Return the output of a script in a process that cannot import this package and has no terminal for questions."""
    env = {"HF_HOME": str(scratch), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [sys.executable, "-I", "-c", _ABSENT + script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def error_line(capsys: Any) -> str:
    """Return the line in which a command has reported its error."""
    lines = capsys.readouterr().err.splitlines()
    assert not any(line.startswith("Traceback") for line in lines)
    return next(line for line in lines if line.startswith("error: "))
