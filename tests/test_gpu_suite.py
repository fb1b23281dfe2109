"""The GPU suite: planted faults are named, finished measurements are kept, and every stage runs at toy size."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import kernels, suite
from benchmarks.gpu.stage import Stage, TimeOver
from recurrent_depth.model.ops import TORCH_OPS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def planted(monkeypatch):
    """A suite of one stage, tests/planted_stage.py, whose processes are killed after about ten seconds."""
    monkeypatch.setattr(suite, "GRACE", 6)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    return [suite.StageInfo("planted", "planted_stage", 0.1)]


def test_suite_names_a_wrong_device_and_a_timeout(tmp_path, planted, capsys):
    rows = suite.run_suite(tmp_path, 1, planted)
    assert rows == [
        {"stage": "planted", "state": "to be continued", "entries": 4, "failed": ["wrong device", "no end"]}
    ]
    entries = json.loads((tmp_path / "planted.json").read_text())["entries"]
    assert "Traceback" in entries["wrong device"]["failure"]
    assert entries["no end"]["failure"].startswith("timeout")
    assert entries["after the failure"]["value"] == 1.0
    suite.show(rows, tmp_path)
    shown = capsys.readouterr().out
    assert "FAILED planted: wrong device: " in shown
    assert "FAILED planted: no end: timeout" in shown


@pytest.mark.slow
def test_suite_names_the_measurement_that_killed_its_process(tmp_path, planted, monkeypatch):
    monkeypatch.setenv("PLANTED", "killed")
    rows = suite.run_suite(tmp_path, 1, planted)
    assert rows[0]["failed"] == ["wrong device", "killed", "no end"]  # what comes after the crash is measured too
    assert "status -9" in json.loads((tmp_path / "planted.json").read_text())["entries"]["killed"]["failure"]


def test_stage_repeats_failed_measurements_only(tmp_path):
    calls = []

    def measured(name, fails):
        calls.append(name)
        if fails:
            raise ValueError("planted")
        return {"value": 1.0}

    first = Stage(tmp_path / "s.json", 60)
    assert first.measure("good", measured, "good", False) == {"value": 1.0}
    assert first.measure("bad", measured, "bad", True) is None
    second = Stage(tmp_path / "s.json", 60)
    assert second.measure("good", measured, "good", False)["value"] == 1.0
    assert second.measure("bad", measured, "bad", False) == {"value": 1.0}
    assert calls == ["good", "bad", "bad"]
    with pytest.raises(TimeOver):
        Stage(tmp_path / "s.json", -1).measure("new", measured, "new", False)


@pytest.mark.slow
def test_suite_repeats_a_stage_in_which_something_failed(tmp_path, planted, monkeypatch):
    monkeypatch.setenv("PLANTED", "short")
    for _ in range(2):
        assert suite.run_suite(tmp_path, 1, planted)[0]["failed"] == ["wrong device"]
    assert not json.loads((tmp_path / "planted.json").read_text())["finished"]


def test_stage_refuses_the_file_of_another_gpu(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps({"environment": {"gpu": "another"}, "entries": {}}))
    with pytest.raises(ValueError, match="another GPU"):
        Stage(tmp_path / "s.json", 60)


def wrong(gate_up):
    return 1.001 * TORCH_OPS.swiglu(gate_up)


def unwritten(gate_up):
    y = TORCH_OPS.swiglu(gate_up).clone()
    y[-1, -1] = float("nan")
    return y


@pytest.mark.parametrize(("swiglu", "reason"), [(wrong, "error 1"), (unwritten, "something was not written")])
def test_planted_kernel_error_is_named(tmp_path, swiglu, reason):
    stage = Stage(tmp_path / "kernels.json", 60)
    for name, ops in (("right", TORCH_OPS), ("planted", replace(TORCH_OPS, swiglu=swiglu))):
        stage.measure(name, kernels.swiglu, torch.device("cpu"), torch.float32, kernels.TOY, ops)
    assert "failure" not in stage.entries["right"]
    assert reason in stage.entries["planted"]["failure"]


@pytest.mark.slow
def test_every_stage_runs_at_toy_size_and_keeps_nothing(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "gpu", "--out", str(tmp_path / "kept")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "nothing was measured" in done.stdout
    assert done.stdout.count(" finished ") == len(suite.STAGES)
    assert not (tmp_path / "kept").exists()
