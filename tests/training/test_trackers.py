"""Trackers show the numbers of metrics.jsonl."""

import dataclasses
import importlib.util
import json
import sqlite3
import struct
import subprocess
import sys
import time

import pytest

from recurrent_depth.cli import main
from recurrent_depth.training.config import as_yaml
from recurrent_depth.training.launch import train
from support import error_line, small_run


def train_numbers(run, name):
    """Return the values of a number by training step, from metrics.jsonl."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record[name] for record in found if name in record}


def read_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in ("loss", "lr", "loss_4")}


def wandb_records(path):
    """Yield the records of an offline file: a header of 7 bytes, then the log format of LevelDB in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # too little of the block is left for a header
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)  # after the checksum
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def read_wandb(run):
    """Return the history of the offline files of a run, and the ids under which they would be uploaded."""
    values, ids = {"loss": {}, "lr": {}, "loss_4": {}}, set()
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        deadline = time.monotonic() + 30  # wandb's own process may still write after finish() has returned
        while not (found := list(wandb_records(path))) or not found[-1].HasField("exit"):
            assert time.monotonic() < deadline, f"{path} has no end"
            time.sleep(0.1)
        for record in found:
            if record.HasField("run"):
                ids.add(record.run.run_id)
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for name in values.keys() & items.keys():
                values[name][items["step"]] = items[name]
    return values, ids


def read_trackio(folder):
    values = {"loss": {}, "lr": {}, "loss_4": {}}
    (path,) = folder.glob("recurrent-depth*.db")
    for step, text in sqlite3.connect(path).execute("select step, metrics from metrics"):
        for name, value in json.loads(text).items():
            if name in values:
                values[name][step] = value
    return values


def assert_shown(values, run):
    for name, shown in values.items():
        expected = train_numbers(run, name)
        assert expected
        assert shown == pytest.approx(expected, rel=1e-6), name


def test_tensorboard_shows_the_numbers_of_the_run(tmp_path):
    pytest.importorskip("tensorboard")
    train(small_run(tmp_path))  # the default, since tensorboard is installed
    assert_shown(read_tensorboard(tmp_path), tmp_path)


def test_wandb_continues_its_run_after_a_resume(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for place in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{place}_DIR", str(tmp_path / "home"))
    config = small_run(tmp_path, trackers=("wandb",), max_hours=1e-9)
    train(config)
    train(dataclasses.replace(config, max_hours=None), resume=True)
    values, ids = read_wandb(tmp_path)
    assert_shown(values, tmp_path)
    assert ids == {(tmp_path / "wandb-id.txt").read_text()}
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.slow
def test_trackio_shows_the_numbers_of_the_run(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    config = tmp_path / "run.yaml"
    config.write_text(as_yaml(small_run(tmp_path / "run", trackers=("trackio",))))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "database"))  # read when trackio is imported: in a new process
    subprocess.run([sys.executable, "-m", "recurrent_depth.cli", "train", "--config", str(config)], check=True)
    assert_shown(read_trackio(tmp_path / "database"), tmp_path / "run")


def test_no_trackers_are_used_when_the_list_is_empty(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(as_yaml(small_run(tmp_path / "run", steps=1)))
    assert main(["train", "--config", str(config), "--trackers", "[]"]) == 0
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_missing_package_of_a_tracker_is_an_error_before_training(tmp_path, monkeypatch, capsys, name):
    find_spec = importlib.util.find_spec
    absent = lambda module, *rest: None if module == name else find_spec(module, *rest)  # noqa: E731
    monkeypatch.setattr("recurrent_depth.extras.find_spec", absent)
    config = tmp_path / "run.yaml"
    config.write_text(as_yaml(small_run(tmp_path / "run")))
    assert main(["train", "--config", str(config), "--trackers", name]) == 1
    expected = f"error: trackers: {name} needs the package {name}, which is missing; run pip install"
    assert error_line(capsys) == f"{expected} 'recurrent-depth[trackers]'"
    assert not (tmp_path / "run").exists()


def test_wandb_without_a_login_is_an_error_with_advice(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    import wandb

    def refuse(**options):
        raise wandb.errors.UsageError("api_key not configured (no-tty)")

    monkeypatch.setattr(wandb, "init", refuse)
    config = tmp_path / "run.yaml"
    config.write_text(as_yaml(small_run(tmp_path / "run")))
    assert main(["train", "--config", str(config), "--trackers", "wandb"]) == 1
    assert "not configured (no-tty)); run `wandb login`, set WANDB_MODE=offline" in error_line(capsys)
