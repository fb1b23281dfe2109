"""Rewinds after loss spikes: the data are skipped, on every rank and after every resume."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from recurrent_depth.runs import CheckpointError, checkpoints
from recurrent_depth.training.config import CheckpointConfig, SpikeConfig
from recurrent_depth.training.health import TrainingAborted
from recurrent_depth.training.launch import train
from recurrent_depth.training.rewind import REWINDS_FILE, Rewind, SpikeGuard, read_rewinds
from recurrent_depth.training.trainer import Trainer
from support import assert_equal_runs, changed_loss, final_tensors, losses, records, run_ranks, small_run

SPIKES = SpikeConfig(factor=2.0, window=4)


def run_config(out, spikes=SPIKES):
    return small_run(out, steps=16, spikes=spikes, checkpoint=CheckpointConfig(every=4, keep_last=4))


def train_with_bad_rows(config, bad: tuple[int, ...] = (10,), kill_after: int = 0) -> None:
    """Train; the rows of some data steps give three times the loss. `kill_after`: die after that many rewinds."""
    resume, rewinds = Trainer.resume, []

    def resumed(self, *args):
        rewinds.append(args)
        if kill_after and len(rewinds) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        resume(self, *args)

    Trainer.resume = resumed
    try:
        with changed_loss(lambda trainer, loss: loss * (3.0 if trainer.data_step in bad else 1.0)):
            train(config, resume=True)
    finally:
        Trainer.resume = resume


def test_rewind_skips_the_data_of_a_spike_and_nothing_else(tmp_path, monkeypatch):
    train_with_bad_rows(run_config(tmp_path / "spiked"))
    (record,) = records(tmp_path / "spiked", "rewind")
    assert (record["step"], record["spike"], record["skipped"]) == (8, 10, 3)
    assert record["loss"] > 2 * record["median"]
    # a run that never saw the rows of steps 8 to 10
    monkeypatch.setattr(SpikeGuard, "data_step", lambda self, step: step if step < 8 else step + 3)
    train(run_config(tmp_path / "without", spikes=SpikeConfig()))
    assert losses(tmp_path / "spiked") == losses(tmp_path / "without")
    spiked, without = final_tensors(tmp_path / "spiked"), final_tensors(tmp_path / "without")
    assert all((spiked[name] == without[name]).all() for name in without)


def test_rewinds_add_up_and_survive_a_resume(tmp_path):
    train_with_bad_rows(run_config(tmp_path / "run"), bad=(10, 13))
    found = records(tmp_path / "run", "rewind")
    assert [(record["step"], record["spike"], record["skipped"]) for record in found] == [(8, 10, 3), (8, 10, 3)]
    entries = json.loads((tmp_path / "run" / REWINDS_FILE).read_text())
    guard = SpikeGuard(SPIKES, tmp_path / "run")
    guard.rewinds = read_rewinds(tmp_path / "run")
    assert [guard.data_step(step) for step in (7, 8, 9)] == [7, 14, 15]
    assert len(entries) == 2
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    train(run_config(tmp_path / "run"), resume=True)  # a new run in the old folder knows nothing of them
    assert not (tmp_path / "run" / REWINDS_FILE).exists()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("world_size", "margin"), [(1, 0), (2, 0), (1, 3)])
def test_kill_during_a_rewind_changes_nothing(tmp_path, world_size, margin):
    """With a margin, the checkpoint to go back to is not the newest, and a resume must not use the newer one."""
    spikes = SpikeConfig(factor=2.0, window=4, margin=margin)
    whole, killed = run_config(tmp_path / "whole", spikes), run_config(tmp_path / "killed", spikes)
    assert run_ranks(train_with_bad_rows, world_size, whole) == [0] * world_size
    assert -signal.SIGKILL in run_ranks(train_with_bad_rows, world_size, killed, (10,), 1)
    assert run_ranks(train_with_bad_rows, world_size, killed) == [0] * world_size
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(checkpoints(tmp_path / "killed")) == len(checkpoints(tmp_path / "whole"))
    assert len(losses(tmp_path / "whole")) == 16


def train_beside_a_stale_file(config) -> None:
    """Train; rank 1 reads an outdated rewinds.json, as can happen on a network file system."""
    read_text = Path.read_text

    def stale(self, *args, **kwargs):
        late = self.name == "rewinds.json" and os.environ["RANK"] == "1"
        return "[]" if late else read_text(self, *args, **kwargs)

    Path.read_text = stale
    train_with_bad_rows(config)


@pytest.mark.slow
@pytest.mark.distributed
def test_rewind_does_not_depend_on_a_stale_file_on_other_ranks(tmp_path):
    assert run_ranks(train_beside_a_stale_file, 2, run_config(tmp_path / "stale")) == [0, 0]
    assert run_ranks(train_with_bad_rows, 2, run_config(tmp_path / "plain")) == [0, 0]
    assert_equal_runs(tmp_path / "stale", tmp_path / "plain")


def test_rewind_to_an_older_checkpoint_does_not_return_to_skipped_data(tmp_path):
    guard = SpikeGuard(SPIKES, tmp_path)
    guard.rewinds = [Rewind(step=8, skipped=3, spike=10, loss=3.0, median=1.0), Rewind(4, 6, 9, 3.0, 1.0)]
    # data 0 to 3, then what follows the spike at training step 9, which had read data 12
    assert [guard.data_step(step) for step in (0, 3, 4, 5, 8, 20)] == [0, 3, 13, 14, 17, 29]


def test_rewind_file_damage_is_named(tmp_path):
    config = dataclasses.replace(run_config(tmp_path / "run"), max_hours=1e-9)
    train(config)
    (tmp_path / "run" / "rewinds.json").write_text('[{"step": 3}]')
    with pytest.raises(CheckpointError, match=r"rewinds\.json is damaged"):
        train(config, resume=True)


def test_repeated_spikes_abort(tmp_path):
    with pytest.raises(TrainingAborted, match="max_rewinds"):
        train_with_bad_rows(run_config(tmp_path / "run", SpikeConfig(2.0, window=4, max_rewinds=2)), bad=range(10, 99))
    assert len(json.loads((tmp_path / "run" / REWINDS_FILE).read_text())) == 2


def test_spike_without_an_older_checkpoint_aborts(tmp_path):
    with pytest.raises(TrainingAborted, match=r"checkpoint\.every"):
        train_with_bad_rows(run_config(tmp_path / "run", SpikeConfig(2.0, window=4, margin=9)))


@pytest.mark.parametrize("wrong", [{"factor": 1.0}, {"window": 0}, {"margin": -1}, {"max_rewinds": -1}])
def test_spike_options_refuse_invalid_values(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} is"):
        SpikeConfig(**wrong)
