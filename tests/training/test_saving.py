"""Saving beside training: the state of the right step, one save after the other, and failures that are heard."""

import os
import resource
import threading

import pytest
import torch

import recurrent_depth.training.saving as saving
from recurrent_depth.runs import CheckpointError, checkpoints, load_run_model
from recurrent_depth.training.config import CheckpointConfig
from recurrent_depth.training.launch import train
from recurrent_depth.training.trainer import Trainer
from support import losses, outcome, run_ranks, small_run

EVERY = CheckpointConfig(every=4, keep_last=9)


def test_training_goes_on_while_the_state_of_the_save_is_written(tmp_path, monkeypatch):
    moved_on = threading.Event()
    write, step = saving._write_shards, Trainer.train_step

    def late(folder, state, group):
        if folder.name.startswith("step-00000004"):
            assert moved_on.wait(60)
        write(folder, state, group)

    def train_step(self):
        record = step(self)
        if self.step == 6:
            moved_on.set()
        return record

    monkeypatch.setattr(saving, "_write_shards", late)
    monkeypatch.setattr(Trainer, "train_step", train_step)
    train(small_run(tmp_path / "beside", checkpoint=EVERY))
    monkeypatch.undo()
    train(small_run(tmp_path / "between", checkpoint=CheckpointConfig(every=4, keep_last=9, background=False)))
    for beside, between in zip(checkpoints(tmp_path / "beside"), checkpoints(tmp_path / "between"), strict=True):
        assert beside.name == between.name
        expected = load_run_model(between).state_dict()
        for name, value in load_run_model(beside).state_dict().items():
            assert torch.equal(value, expected[name]), name


def test_a_save_waits_for_the_one_before(tmp_path, monkeypatch):
    write, running, most = saving._write_shards, [], []

    def watched(folder, state, group):
        running.append(folder)
        most.append(len(running))
        write(folder, state, group)
        running.remove(folder)

    monkeypatch.setattr(saving, "_write_shards", watched)
    train(small_run(tmp_path / "run", checkpoint=CheckpointConfig(every=1, keep_last=2)))
    assert most == [1] * 12
    assert len(checkpoints(tmp_path / "run")) == 2


def train_on_a_full_disk(config, victim: int) -> None:
    """From the second save on, no file of this process may exceed 64 KiB: the operating system refuses the write."""
    save = Trainer.save

    def full(self):
        if self.step == 8 and int(os.environ["RANK"]) == victim:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
        save(self)

    Trainer.save = full
    outcome(config.out, train, config)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_stops_every_rank_and_leaves_the_previous_checkpoint(tmp_path, world_size):
    run = tmp_path / "run"
    codes = run_ranks(train_on_a_full_disk, world_size, small_run(run), world_size - 1)
    assert 0 not in codes
    assert "could not be written" in (run / "outcome-0.txt").read_text()
    assert "File too large" in (run / f"outcome-{world_size - 1}.txt").read_text()
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000004"]
    assert run_ranks(train_quietly, world_size, small_run(run)) == [0] * world_size
    assert run_ranks(train_quietly, world_size, small_run(tmp_path / "whole")) == [0] * world_size
    assert losses(run) == losses(tmp_path / "whole")


def train_quietly(config) -> None:
    train(config, resume=True)


def test_a_failure_in_the_background_is_raised_at_the_next_step(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "_finish", lambda *args: (_ for _ in ()).throw(OSError("the disk is gone")))
    failed = threading.Event()
    monkeypatch.setattr(saving.shutil, "rmtree", lambda *args, **kwargs: failed.set())
    step = Trainer.train_step

    def train_step(self):
        if self.step == 6:
            assert failed.wait(60)
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(CheckpointError, match="the disk is gone"):
        train(small_run(tmp_path / "run"))
    assert len(losses(tmp_path / "run")) <= 7
