"""A run that is killed anywhere and resumed equals the undisturbed run bit for bit."""

import os
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import recurrent_depth.training.checkpoint as checkpoint_module
from recurrent_depth.runs import checkpoints
from recurrent_depth.training.launch import train
from recurrent_depth.training.optimizer import HuginnAdam
from recurrent_depth.training.trainer import Trainer
from support import losses, run_ranks, small_run

PHASES = {
    "data": (Trainer, "_batch"),
    "backward": (torch.Tensor, "backward"),
    "optimizer": (HuginnAdam, "_move"),
    "save": (checkpoint_module, "_write_shards"),
    "finish": (checkpoint_module, "_finish"),
}


def train_until_killed(out: Path, phase: str, call: int, victim: int) -> None:
    """Train; rank `victim` kills itself in the middle of the `call`-th call of the phase."""
    owner, name = PHASES[phase]
    original, calls = getattr(owner, name), [0]

    def deadly(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call and int(os.environ["RANK"]) == victim:
            if phase == "save":  # half a file is on disk
                (args[0] / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, deadly)
    train(small_run(out), resume=True)


def train_quietly(out: Path) -> None:
    train(small_run(out), resume=True)


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(checkpoints(run)[-1].glob("*.safetensors")):
        tensors |= {f"{path.name}:{name}": value for name, value in load_file(path).items()}
    return tensors


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_kills_leave_no_trace(tmp_path, world_size):
    assert run_ranks(train_quietly, world_size, tmp_path / "whole") == [0] * world_size
    rng = random.Random(world_size)
    kills, attempts = 0, 0
    while kills < 12:
        attempts += 1
        out = tmp_path / f"killed-{kills // 4}"  # four kills on the way of one run
        phase = list(PHASES)[attempts % len(PHASES)]
        victim = 0 if phase == "finish" else rng.randrange(world_size)
        call = rng.randint(1, {"data": 8, "backward": 8, "optimizer": 90, "save": 1, "finish": 1}[phase])
        codes = run_ranks(train_until_killed, world_size, out, phase, call, victim)
        if codes[victim] == -signal.SIGKILL:
            kills += 1
        elif codes == [0] * world_size:
            continue  # the run was over before the call came
        assert attempts < 60
    for number in range(3):
        out = tmp_path / f"killed-{number}"
        assert run_ranks(train_quietly, world_size, out) == [0] * world_size
        assert losses(out) == losses(tmp_path / "whole")
        expected, actual = final_tensors(tmp_path / "whole"), final_tensors(out)
        assert expected.keys() == actual.keys()
        assert sum(name.endswith("adapter.weight.exp_avg") for name in actual) == world_size
        assert all(torch.equal(expected[name], actual[name]) for name in expected)
