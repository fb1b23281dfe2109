"""Training on several ranks, sharded, or in bfloat16 gives the results of one process."""

import dataclasses
import os

import pytest
import torch

from recurrent_depth.training.config import OptimizerConfig, RunConfig, RuntimeConfig
from recurrent_depth.training.launch import train
from recurrent_depth.training.trainer import Trainer
from support import assert_equal_runs, changed_loss, losses, run_ranks, small_run

CPU = RuntimeConfig(device="cpu", threads=1)


def close(actual: list[float], expected: list[float], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=tolerance, atol=0)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "runtime", "optimizer"),
    [
        (2, CPU, "huginn"),
        (2, dataclasses.replace(CPU, shard_size=1), "huginn"),
        pytest.param(2, dataclasses.replace(CPU, reshard_after_forward=True), "adamw", marks=pytest.mark.slow),
        pytest.param(4, dataclasses.replace(CPU, shard_size=2), "huginn", marks=pytest.mark.slow),
        pytest.param(4, dataclasses.replace(CPU, activation_checkpointing="step"), "nadamw", marks=pytest.mark.slow),
        pytest.param(2, CPU, "muon", marks=pytest.mark.slow),
        pytest.param(4, dataclasses.replace(CPU, shard_size=2), "muon", marks=pytest.mark.slow),
    ],
)
def test_sharded_training_equals_one_process(tmp_path, world_size, runtime, optimizer):
    config = small_run(tmp_path / "one", optimizer=OptimizerConfig(name=optimizer, lr=2e-3, warmup_steps=3))
    train(config)
    many = dataclasses.replace(config, out=str(tmp_path / "many"), runtime=runtime)
    assert run_ranks(train, world_size, many) == [0] * world_size
    # Muon orthogonalises in bfloat16, where sums in another order can round differently
    close(losses(tmp_path / "many"), losses(tmp_path / "one"), tolerance=1e-3 if optimizer == "muon" else 1e-5)


def train_some(config: RunConfig, steps_before_stop: int) -> None:
    """Train to the end, or request a stop after some training steps."""
    original = Trainer.train_step

    def train_step(self):
        self.stop_requested |= self.step + 1 == steps_before_stop
        return original(self)

    Trainer.train_step = train_step
    train(config, resume=True)


@pytest.mark.slow
@pytest.mark.distributed
def test_resume_works_at_another_number_of_ranks(tmp_path):
    train(small_run(tmp_path / "whole"))
    moved = small_run(tmp_path / "moved")
    for world_size, stop in [(2, 3), (4, 7), (1, 10), (2, 0)]:
        assert run_ranks(train_some, world_size, moved, stop) == [0] * world_size
    close(losses(tmp_path / "moved"), losses(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_muon_resumes_bitwise(tmp_path, world_size):
    muon = OptimizerConfig(name="muon", lr=2e-3, warmup_steps=3)
    whole, stopped = (small_run(tmp_path / name, optimizer=muon) for name in ("whole", "stopped"))
    assert run_ranks(train_some, world_size, whole, 0) == [0] * world_size
    for stop in (5, 0):
        assert run_ranks(train_some, world_size, stopped, stop) == [0] * world_size
    assert_equal_runs(tmp_path / "stopped", tmp_path / "whole")


def train_with_nan(config: RunConfig, step: int, rank: int) -> None:
    """Train; the loss of one rank is NaN at one training step."""
    planted = int(os.environ["RANK"]) == rank
    with changed_loss(lambda trainer, loss: loss * float("nan") if planted and trainer.step == step else loss):
        train(config)


@pytest.mark.distributed
def test_nan_on_one_rank_skips_the_step_on_all(tmp_path):
    assert run_ranks(train_with_nan, 2, small_run(tmp_path / "run", steps=6), 3, 1) == [0, 0]
    values = losses(tmp_path / "run")
    assert [value != value for value in values] == [False, False, False, True, False, False]


def test_bfloat16_trains_with_fp32_master_weights(tmp_path):
    run = small_run(tmp_path / "run", runtime=dataclasses.replace(CPU, dtype="bfloat16"))
    assert run_ranks(train, 1, run) == [0]
    train(small_run(tmp_path / "fp32"))
    close(losses(tmp_path / "run"), losses(tmp_path / "fp32"), tolerance=2e-2)
