"""What a run reports while it trains: metrics.jsonl and the line on the terminal."""

import dataclasses
import json
import re

import pytest
import torch

from recurrent_depth.model.flops import PEAK_FLOPS, training_flops
from recurrent_depth.model.recurrence import sample_depth
from recurrent_depth.training.config import RuntimeConfig
from recurrent_depth.training.launch import train
from recurrent_depth.training.parallel import Ranks
from recurrent_depth.training.progress import Speed, peak_of_ranks, status_line
from support import losses, records, small_run


def test_report_holds_speed_flops_memory_and_remaining_time(tmp_path, capsys):
    runtime = RuntimeConfig(device="cpu", threads=1, activation_checkpointing="step")
    config = small_run(tmp_path, runtime=runtime, log_every=4)
    train(config)
    found = records(tmp_path)
    assert [record["step"] for record in found] == [4, 8, 12]
    for record in found:
        assert 0 < record["data_seconds"] < record["seconds"]
        assert record["step_seconds"] == pytest.approx(record["seconds"] / 4)
        assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["seconds"])
        assert 2**26 < record["peak_memory_bytes"] < 2**36
        assert "mfu" not in record  # the peak of a CPU is not known
    assert found[0]["eta_seconds"] > found[-1]["eta_seconds"] == 0
    printed = capsys.readouterr().err
    line = r"step 12/12 loss [\d.]+  lr \d\.\d\de-\d\d  gradient [\d.]+  depth \d+  [\d,]+ tok/s  step [\d.e-]+ s "
    assert re.search(line + r"\(data \d+%\)  peak [\d.]+ GB  ETA 0:00:00", printed)
    assert re.search(r"step 12 validation loss  r=1 [\d.]+  r=4 [\d.]+", printed)


def test_report_counts_flops_with_and_without_recomputation(tmp_path):
    runtime = RuntimeConfig(device="cpu", threads=1, activation_checkpointing="step")
    config = small_run(tmp_path, runtime=runtime, steps=1)
    train(config)
    (record,) = records(tmp_path)
    tokens = int(record["tokens"]) // config.batch_size
    depths = [sample_depth(config.model, seed=0, step=0, micro_step=micro) for micro in range(2)]
    rows = config.batch_size // config.micro_steps
    assert record["flops"] == sum(rows * training_flops(config.model, tokens, n, k, "step") for n, k in depths)
    assert record["useful_flops"] == sum(rows * training_flops(config.model, tokens, n, k) for n, k in depths)


def test_utilisation_is_flops_over_seconds_and_peak():
    speed = Speed(torch.device("cpu"), peak=200.0)
    step = {"tokens": 10.0, "flops": 300.0, "useful_flops": 240.0, "data_seconds": 0.5}
    speed.add(2.0, step)
    speed.add(4.0, step)
    record = speed.take(steps_left=0)
    assert (record["mfu"], record["hfu"]) == pytest.approx((480 / 6 / 200, 600 / 6 / 200))
    assert record["step_seconds"] == 3
    shown = status_line(record | {"loss": 1.0, "lr": 1e-3, "gradient_norm": 0.5, "num_steps": 8.0})
    assert "step 3 s (data 17%)  MFU 40.0%, HFU 50.0%  peak" in shown
    speed.add(1.0, step)
    assert speed.take(0)["flops"] == 300  # only of the steps since the last report


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "auto", 4 * PEAK_FLOPS["H100"]),
        ("NVIDIA H100 80GB HBM3", "float32", None),  # the known peaks are those of bfloat16
        ("NVIDIA GeForce RTX 4090", "auto", None),
    ],
)
def test_peak_is_that_of_all_ranks_in_bfloat16(monkeypatch, name, dtype, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    ranks = Ranks(0, 4, torch.device("cuda", 0))
    assert peak_of_ranks(dataclasses.replace(RuntimeConfig(), dtype=dtype), ranks) == peak


def test_profile_writes_a_trace_of_three_training_steps(tmp_path, capsys):
    config = small_run(tmp_path, profile=True, steps=9)
    train(config)
    path = tmp_path / "profile" / "steps-6-8.json"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    names = [event["name"] for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 3
    assert "aten::mm" in names
    assert f"trace of the training steps 6 to 8: {path}" in " ".join(capsys.readouterr().err.split("\n"))
    train(small_run(tmp_path / "plain", steps=9))
    assert losses(tmp_path) == losses(tmp_path / "plain")


def test_profile_of_too_few_training_steps_says_so(tmp_path, capsys):
    train(small_run(tmp_path, profile=True, steps=7))
    assert "no trace was written: profile needs 8 training steps" in capsys.readouterr().err
    assert not (tmp_path / "profile").exists()
