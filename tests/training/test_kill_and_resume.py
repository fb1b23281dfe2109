"""A run that is killed at any point and resumed equals the undisturbed run bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kills import PHASES, plant_kill
from recurrent_depth.training.launch import train
from support import assert_equal_runs, final_tensors, run_ranks, small_run


def train_until_killed(out: Path, phase: str, call: int, victim: int) -> None:
    plant_kill(phase, call, victim)
    train(small_run(out), resume=True)


def train_quietly(out: Path) -> None:
    train(small_run(out), resume=True)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_and_resumed_run_equals_an_undisturbed_one(tmp_path, world_size):
    assert run_ranks(train_quietly, world_size, tmp_path / "whole") == [0] * world_size
    rng = random.Random(world_size)
    kills, attempts = 0, 0
    while kills < 6:
        attempts += 1
        out = tmp_path / f"killed-{kills // 3}"  # three kills per run
        phase = list(PHASES)[attempts % len(PHASES)]
        victim = 0 if phase == "finish" else rng.randrange(world_size)
        call = rng.randint(1, {"data": 8, "backward": 8, "optimizer": 90, "save": 2, "finish": 2}[phase])
        codes = run_ranks(train_until_killed, world_size, out, phase, call, victim)
        if codes[victim] == -signal.SIGKILL:
            kills += 1
        elif codes == [0] * world_size:
            continue  # the run finished before that call
        assert attempts < 60
    for number in range(2):
        out = tmp_path / f"killed-{number}"
        assert run_ranks(train_quietly, world_size, out) == [0] * world_size
        assert_equal_runs(out, tmp_path / "whole")
        assert sum(name.endswith("adapter.weight.exp_avg") for name in final_tensors(out)) == world_size


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_restarts_complete_a_killed_run(tmp_path):
    """After four kills under `torchrun --max-restarts` the run completes and equals an undisturbed one."""
    plan = [("data", 10, 1), ("save", 1, 0), ("optimizer", 40, 1), ("backward", 3, 0)]
    elastic, plain = tmp_path / "elastic", tmp_path / "plain"
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    for out, kills in ((elastic, plan), (plain, [])):
        out.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += ["--max-restarts", str(len(plan)), "--monitor-interval", "0.1"]
        command += [str(tests / "elastic_run.py"), str(out), json.dumps(kills)]
        env = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
    assert (elastic / "attempts-0.txt").read_text().split() == ["0", "1", "2", "3", "4"]
    assert_equal_runs(elastic / "run", plain / "run")
