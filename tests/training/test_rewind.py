"""A loss spike: back to a checkpoint, on without the data that led there, the same on every rank and every time."""

import json
import os
import shutil
import signal

import pytest

from recurrent_depth.runs import checkpoints
from recurrent_depth.training.config import CheckpointConfig, SpikeConfig
from recurrent_depth.training.health import TrainingAborted
from recurrent_depth.training.launch import train
from recurrent_depth.training.rewind import REWINDS_FILE, SpikeGuard
from recurrent_depth.training.trainer import Trainer
from support import final_tensors, losses, run_ranks, small_run

SPIKES = SpikeConfig(factor=2.0, window=4)


def run_config(out, spikes=SPIKES):
    return small_run(out, steps=16, spikes=spikes, checkpoint=CheckpointConfig(every=4, keep_last=4))


def train_with_bad_rows(config, bad: tuple[int, ...] = (10,), kill_after: int = 0) -> None:
    """The rows of some draws give three times the loss. `kill_after`: die after that many rewinds."""
    original, resume, rewinds = Trainer._loss, Trainer.resume, []

    def loss(self, *args):
        return original(self, *args) * (3.0 if self.draw in bad else 1.0)

    def resumed(self, checkpoint):
        rewinds.append(checkpoint)
        if kill_after and len(rewinds) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        resume(self, checkpoint)

    Trainer._loss, Trainer.resume = loss, resumed
    try:
        train(config, resume=True)
    finally:
        Trainer._loss, Trainer.resume = original, resume


def rewinds(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["type"] == "rewind"]


def test_a_spike_leaves_out_its_data_and_nothing_else(tmp_path, monkeypatch):
    train_with_bad_rows(run_config(tmp_path / "spiked"))
    (record,) = rewinds(tmp_path / "spiked")
    assert (record["step"], record["spike"], record["skipped"]) == (8, 10, 3)
    assert record["loss"] > 2 * record["median"]
    # a run that never saw the rows of steps 8 to 10
    monkeypatch.setattr(SpikeGuard, "draw", lambda self, step: step if step < 8 else step + 3)
    train(run_config(tmp_path / "without", spikes=SpikeConfig()))
    assert losses(tmp_path / "spiked") == losses(tmp_path / "without")
    spiked, without = final_tensors(tmp_path / "spiked"), final_tensors(tmp_path / "without")
    assert all((spiked[name] == without[name]).all() for name in without)


def test_two_spikes_add_up_and_a_resume_remembers_them(tmp_path):
    train_with_bad_rows(run_config(tmp_path / "run"), bad=(10, 13))
    assert [(r["step"], r["spike"], r["skipped"]) for r in rewinds(tmp_path / "run")] == [(8, 10, 3), (8, 10, 3)]
    entries = json.loads((tmp_path / "run" / REWINDS_FILE).read_text())
    guard = SpikeGuard(SPIKES, tmp_path / "run")
    guard.restore([])
    assert [guard.draw(step) for step in (7, 8, 9)] == [7, 14, 15]
    assert len(entries) == 2
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    train(run_config(tmp_path / "run"), resume=True)  # a new run in the old folder knows nothing of them
    assert not (tmp_path / "run" / REWINDS_FILE).exists()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_kill_in_the_middle_of_a_rewind_changes_nothing(tmp_path, world_size):
    whole, killed = run_config(tmp_path / "whole"), run_config(tmp_path / "killed")
    assert run_ranks(train_with_bad_rows, world_size, whole) == [0] * world_size
    assert -signal.SIGKILL in run_ranks(train_with_bad_rows, world_size, killed, (10,), 1)
    assert run_ranks(train_with_bad_rows, world_size, killed) == [0] * world_size
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(checkpoints(tmp_path / "killed")) == len(checkpoints(tmp_path / "whole"))
    assert len(losses(tmp_path / "whole")) == 16


def test_a_loss_that_keeps_spiking_aborts(tmp_path):
    with pytest.raises(TrainingAborted, match="max_rewinds"):
        train_with_bad_rows(run_config(tmp_path / "run", SpikeConfig(2.0, window=4, max_rewinds=2)), bad=range(10, 99))
    assert len(json.loads((tmp_path / "run" / REWINDS_FILE).read_text())) == 2


def test_a_spike_before_any_checkpoint_aborts(tmp_path):
    with pytest.raises(TrainingAborted, match=r"checkpoint\.every"):
        train_with_bad_rows(run_config(tmp_path / "run", SpikeConfig(2.0, window=4, margin=9)))


@pytest.mark.parametrize("wrong", [{"factor": 1.0}, {"window": 0}, {"margin": -1}, {"max_rewinds": -1}])
def test_impossible_values_name_their_field(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} is"):
        SpikeConfig(**wrong)
