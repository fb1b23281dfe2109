"""Saving in the background: the state of the right training step, one save at a time, and errors that end the run."""

import os
import resource
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from recurrent_depth.cli import main
from recurrent_depth.runs import CheckpointError, checkpoints, load_run_model
from recurrent_depth.training.config import CheckpointConfig, as_yaml
from recurrent_depth.training.launch import train
from recurrent_depth.training.trainer import Trainer
from support import full_disk, losses, outcome, run_ranks, small_run

EVERY = CheckpointConfig(every=4, keep_last=9)


def test_save_in_the_background_writes_the_state_of_its_step(tmp_path, monkeypatch):
    moved_on = threading.Event()
    write, step = dcp.save, Trainer.train_step

    def late(*args, storage_writer, **kwargs):
        if Path(storage_writer.path).parent.name.startswith("step-00000004"):
            assert moved_on.wait(60)
        write(*args, storage_writer=storage_writer, **kwargs)

    def train_step(self):
        record = step(self)
        if self.step == 6:
            moved_on.set()
        return record

    monkeypatch.setattr(dcp, "save", late)
    monkeypatch.setattr(Trainer, "train_step", train_step)
    train(small_run(tmp_path / "beside", checkpoint=EVERY))
    monkeypatch.undo()
    train(small_run(tmp_path / "between", checkpoint=CheckpointConfig(every=4, keep_last=9, background=False)))
    for beside, between in zip(checkpoints(tmp_path / "beside"), checkpoints(tmp_path / "between"), strict=True):
        assert beside.name == between.name
        expected = load_run_model(between).state_dict()
        for name, value in load_run_model(beside).state_dict().items():
            assert torch.equal(value, expected[name]), name


def test_save_waits_for_the_previous_one(tmp_path, monkeypatch):
    write, running, most = dcp.save, [], []

    def watched(*args, **kwargs):
        running.append(1)
        most.append(len(running))
        write(*args, **kwargs)
        running.pop()

    monkeypatch.setattr(dcp, "save", watched)
    train(small_run(tmp_path / "run", checkpoint=CheckpointConfig(every=1, keep_last=2)))
    assert most == [1] * 24  # weights and moments of twelve checkpoints
    assert len(checkpoints(tmp_path / "run")) == 2


def train_on_a_full_disk(config, victim: int) -> None:
    """Train; from the second save on, the operating system refuses files of this process above 64 KiB."""
    save = Trainer.save

    def full(self):
        if self.step == 8 and int(os.environ["RANK"]) == victim:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
        save(self)

    Trainer.save = full
    outcome(config.out, train, config)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_full_disk_stops_every_rank_and_keeps_the_previous_checkpoint(tmp_path, world_size):
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


def test_background_save_error_is_raised_at_the_next_step(tmp_path, monkeypatch):
    replace, step = os.replace, Trainer.train_step

    def gone(source, target):
        if Path(target).parent.name == "checkpoints":
            raise OSError("the disk is gone")
        replace(source, target)

    def train_step(self):
        deadline = time.monotonic() + 60
        while self.step == 6 and self.writer.error is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return step(self)

    monkeypatch.setattr(os, "replace", gone)
    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(CheckpointError, match="the disk is gone"):
        train(small_run(tmp_path / "run"))
    assert len(losses(tmp_path / "run")) <= 7


def test_save_removes_the_remains_of_a_killed_one(tmp_path):
    config = small_run(tmp_path / "run", max_hours=1e-9)
    train(config)
    left = tmp_path / "run" / "checkpoints" / "step-00000003.tmp" / "model"
    left.mkdir(parents=True)
    (left / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    train(config, resume=True)
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("name", ["run.yaml", "tokenizer.json", "metrics.jsonl", "checkpoint.json", "safetensors"])
def test_full_disk_ends_training_with_one_line(tmp_path, monkeypatch, capsys, name):
    (tmp_path / "run.yaml").write_text(as_yaml(small_run(tmp_path / "run")))
    full_disk(monkeypatch, f".{name}" if name == "run.yaml" else name)
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 1
    *_, message = capsys.readouterr().err.splitlines()
    assert message.startswith("error: ")
    assert "No space left on device" in message
    assert "free some space" in message
    assert str(tmp_path / "run") in message
    assert checkpoints(tmp_path / "run") == []
    monkeypatch.undo()
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--resume", "true"]) == 0
