"""Hugging Face folders that a run writes of its checkpoints."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from recurrent_depth.cli import main
from recurrent_depth.runs import checkpoints, load_run_model
from recurrent_depth.training.config import CheckpointConfig, RunExportConfig, as_yaml
from recurrent_depth.training.launch import train
from support import changed_loss, error_line, losses, run_ranks, small_run


def exported_logits(folder, ids):
    from recurrent_depth.hf.loading import load_model

    return load_model(str(folder))[0](ids).logits


@pytest.mark.slow
def test_run_exports_every_second_checkpoint_and_the_last(tmp_path, capsys):
    pytest.importorskip("transformers")
    saved = CheckpointConfig(every=3, keep_last=1)  # the exported checkpoints are removed by later ones
    export = RunExportConfig(every=2, at_end=True)
    train(small_run(tmp_path / "run", steps=11, checkpoint=saved, export=export))
    assert sorted(os.listdir(tmp_path / "run" / "exports")) == ["step-00000006", "step-00000011"]
    assert "exported step-00000011 to " in capsys.readouterr().err
    ids = torch.arange(16)[None]
    expected = load_run_model(tmp_path / "run")(ids).logits
    torch.testing.assert_close(exported_logits(tmp_path / "run" / "exports" / "step-00000011", ids), expected)
    train(small_run(tmp_path / "plain", steps=11, checkpoint=saved))
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


@pytest.mark.distributed
@pytest.mark.slow
def test_run_of_two_ranks_exports_its_last_checkpoint(tmp_path):
    pytest.importorskip("transformers")
    config = small_run(tmp_path / "run", steps=4, export=RunExportConfig(at_end=True, dtype="bfloat16"))
    assert run_ranks(train, 2, config) == [0, 0]
    ids = torch.arange(16)[None]
    expected = load_run_model(tmp_path / "run").bfloat16()(ids).logits
    logits = exported_logits(tmp_path / "run" / "exports" / "step-00000004", ids)
    torch.testing.assert_close(logits.float(), expected.float(), rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_failed_export_is_a_warning_and_the_run_goes_on(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "exports").write_text("a file where the folder would be")
    train(small_run(run, steps=8, export=RunExportConfig(every=1)))
    printed = capsys.readouterr().err
    assert printed.count("was not exported (error: ") == 2
    assert f"try: recurrent-depth export --model {checkpoints(run)[-1]}" in printed
    assert len(losses(run)) == 8


def test_stopped_run_ends_its_export(tmp_path, monkeypatch):
    """A run that is asked to stop has little time left: it does not wait for an export."""
    popen = subprocess.Popen
    started = []

    def endless(command, **options):
        started.append(popen([sys.executable, "-c", "import time; time.sleep(600)"], **options))
        return started[-1]

    monkeypatch.setattr("recurrent_depth.training.exporting.subprocess.Popen", endless)

    def stop(trainer, loss):
        trainer.stop_requested |= bool(started)
        return loss

    config = small_run(tmp_path, steps=200, checkpoint=CheckpointConfig(every=100), export=RunExportConfig(every=1))
    with changed_loss(stop):
        train(config)
    assert [process.poll() for process in started] == [-15]
    assert 100 < len(losses(tmp_path)) < 200
    assert len(checkpoints(tmp_path)) == 2


def test_missing_package_for_exports_is_an_error_before_training(tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    absent = lambda module, *rest: None if module == "transformers" else find_spec(module, *rest)  # noqa: E731
    monkeypatch.setattr("recurrent_depth.extras.find_spec", absent)
    config = tmp_path / "run.yaml"
    config.write_text(as_yaml(small_run(tmp_path / "run")))
    assert main(["train", "--config", str(config), "--export.at_end", "true"]) == 1
    assert error_line(capsys) == (
        "error: export needs the package transformers, which is missing; run pip install 'recurrent-depth[hf]'"
    )
