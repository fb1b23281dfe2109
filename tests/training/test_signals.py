"""A run that is asked to stop saves first, and can be continued."""

import os
import signal
import time

import pytest

from recurrent_depth.runs import checkpoints
from recurrent_depth.training.launch import train
from recurrent_depth.training.trainer import Trainer
from support import losses, run_ranks, small_run


def train_with_signal(config, step: int, rank: int, number: int) -> None:
    """Train; rank `rank` gets the signal in the middle of a step."""
    original = Trainer._loss

    def loss(self, *args):
        if self.step == step and args[-1] == 0 and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), number)
        return original(self, *args)

    Trainer._loss = loss
    train(config, resume=True)


def train_on(config) -> None:
    train(config, resume=True)


@pytest.mark.distributed
@pytest.mark.parametrize(("world_size", "number"), [(1, signal.SIGINT), (1, signal.SIGUSR1), (2, signal.SIGTERM)])
def test_a_signal_saves_and_exits_cleanly(tmp_path, world_size, number):
    config = small_run(tmp_path / "stopped")
    assert run_ranks(train_with_signal, world_size, config, 5, world_size - 1, number) == [0] * world_size
    assert checkpoints(tmp_path / "stopped")[-1].name == "step-00000006"
    assert len(losses(tmp_path / "stopped")) == 6
    assert run_ranks(train_on, world_size, config) == [0] * world_size
    assert run_ranks(train_on, world_size, small_run(tmp_path / "whole")) == [0] * world_size
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


@pytest.mark.parametrize(("seconds_left", "steps"), [(30, 1), (3600, 12)])
def test_a_slurm_job_saves_before_it_ends(tmp_path, monkeypatch, seconds_left, steps):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + seconds_left))
    train(small_run(tmp_path / "run", slurm_margin_minutes=1.0))
    assert len(losses(tmp_path / "run")) == steps
    assert checkpoints(tmp_path / "run")[-1].name == f"step-{steps:08d}"


def test_a_time_limit_saves(tmp_path):
    config = small_run(tmp_path / "run", max_hours=1e-9)
    train(config)
    assert checkpoints(tmp_path / "run")[-1].name == "step-00000001"
