"""Restart of `prepare`: an interrupted preparation continues and writes the same files."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from recurrent_depth.cli import main
from recurrent_depth.data.config import PrepareConfig
from recurrent_depth.data.layout import DataError
from recurrent_depth.data.preparation.command import prepare
from recurrent_depth.data.preparation.job import Job
from recurrent_depth.data.preparation.phases import phases
from recurrent_depth.data.preparation.sources import read
from recurrent_depth.files import folder_lock
from recurrent_depth.parsing import parse_options

WORDS = [a + b + c for a in "bdgklmnprst" for b in "aeiou" for c in ("", "n", "r", "s", "lo", "mi")]


def folder_hash(folder):
    """Return one SHA-256 of all file names and contents of a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Return a configuration file with two sources and every filter."""
    folder, generator = tmp_path_factory.mktemp("sources"), random.Random(0)
    question = " ".join(generator.choices(WORDS, k=20))
    (folder / "evaluation.jsonl").write_text(json.dumps({"text": question}) + "\n")
    sources = []
    for name, documents in (("first", 300), ("second", 120)):
        texts = [
            f"{name} {n} " + " ".join(generator.choices(WORDS, k=generator.randint(20, 90))) for n in range(documents)
        ]
        texts[5], texts[60], texts[70] = texts[50], texts[61] + " more", texts[70] + " " + question
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        sources.append({"name": name, "address": str(folder / f"{name}.jsonl"), "category": name})
    config = {
        "sources": sources, "category_shares": {"first": 3, "second": 1}, "vocab_size": 700, "sequence_length": 48,
        "part_bytes": 12_000, "files": 3, "validation_share": 0.2, "policy": "huginn",
        "filters": {
            "exact_duplicates": True, "near_duplicates": True,
            "evaluation_sets": [{"name": "e", "address": str(folder / "evaluation.jsonl")}],
        },
    }  # fmt: skip
    file = folder / "mix.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def config_of(options, out, **changes):
    arguments = ["--config", str(options), "--out", str(out)]
    for name, value in changes.items():
        arguments += [f"--{name}", json.dumps(value)]
    return parse_options(PrepareConfig, arguments)


@pytest.fixture(scope="module")
def undisturbed(options, tmp_path_factory):
    """Return the hash of the folder that an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("undisturbed") / "data"
    prepare(config_of(options, out))
    return folder_hash(out)


def test_restart_repeats_only_failed_task(options, undisturbed, tmp_path, monkeypatch):
    out = tmp_path / "data"
    config = config_of(options, out)
    job = Job.plan(config)
    store, done = type(job.work).store, []

    class Broken(Exception):
        pass

    def record(work, phase, task, result):
        if (phase, task) in broken:
            broken.remove((phase, task))
            raise Broken
        done.append((phase, task))
        store(work, phase, task, result)

    monkeypatch.setattr(type(job.work), "store", record)
    generator = random.Random(3)
    broken = [(phase.name, generator.randrange(phase.tasks)) for phase in phases(job)]
    failures = len(broken)
    for _ in range(failures - 1):  # the last task stores its result after the folder is renamed
        with pytest.raises(Broken):
            prepare(config)
        assert not out.exists()
    with pytest.raises(Broken):
        prepare(config)
    prepare(config)
    assert len(done) == len(set(done)) == sum(phase.tasks for phase in phases(job)) - 1
    assert folder_hash(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_restart_refuses_other_options_and_changed_sources(options, tmp_path, monkeypatch):
    out = tmp_path / "data"
    monkeypatch.setattr("recurrent_depth.data.preparation.phases.make_tokenizer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(config_of(options, out))
    with pytest.raises(DataError, match=r"other options \(sequence_length\).*--restart"):
        prepare(config_of(options, out, sequence_length=32))
    source = Path(config_of(options, out).sources[0].address)
    before = source.stat()
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    with pytest.raises(DataError, match="sources have changed"):
        prepare(config_of(options, out))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ZeroDivisionError):  # restart=True accepts the other options
        prepare(config_of(options, out, sequence_length=32, restart=True))


def test_restart_error_names_damaged_shard(options, tmp_path, monkeypatch):
    out = tmp_path / "data"
    config = config_of(options, out)
    with monkeypatch.context() as patch:
        patch.setattr("recurrent_depth.data.preparation.phases.write_parquet", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(config)
    shard = sorted((tmp_path / "data.unfinished" / "rows").glob("*.train.arrow"))[1]
    shard.write_bytes(shard.read_bytes()[:-200])
    with pytest.raises(DataError, match=rf"{shard.name} is damaged.*--restart true"):
        prepare(config)
    assert not out.exists()


def test_restart_refuses_source_that_lost_lines(options, tmp_path, monkeypatch):
    config = config_of(options, tmp_path / "data")

    def shorter(source, part):
        return (document for document in list(read(source, part))[:-1])

    with monkeypatch.context() as patch:
        patch.setattr("recurrent_depth.data.preparation.phases.sign_part", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(config)
    monkeypatch.setattr("recurrent_depth.data.preparation.filters.read", shorter)
    with pytest.raises(DataError, match="source first changed while it was prepared"):
        prepare(config)


def test_prepare_refuses_folder_in_use(options, tmp_path, monkeypatch, capsys):
    out = tmp_path / "data"
    monkeypatch.setattr("recurrent_depth.data.preparation.command.LOCK_PATIENCE_S", 0.1)
    (tmp_path / "data.unfinished").mkdir()
    with folder_lock(tmp_path / "data.unfinished"):
        assert main(["prepare", "--config", str(options), "--out", str(out)]) == 1
    assert "is in use by process" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_prepare_killed_in_every_phase_writes_identical_files(options, undisturbed, tmp_path, workers):
    """Kill each of the eleven phases at a seeded moment, then run the same command again."""
    out = tmp_path / "data"
    job = Job.plan(config_of(options, out))
    generator = random.Random(workers)
    kills = 0
    steps = phases(job)
    for before, step in zip([None, *steps], steps, strict=False):
        started = 0 if step.tasks == 1 else generator.randrange(step.tasks)
        enough = (before, before.tasks) if before and not started else (step, started)
        process = start(options, out, workers)
        while process.poll() is None and finished_tasks(job, enough[0]) < enough[1]:
            time.sleep(0.001)
        if step.name == "tokenizer":
            time.sleep(generator.uniform(0.2, 2.0))
        time.sleep(generator.uniform(0, 0.01))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        if step.name != "finish":
            assert not out.exists()
    if job.work.folder.exists():
        assert start(options, out, workers).wait() == 0
    assert kills >= 10
    assert folder_hash(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.slow
def test_prepare_reports_killed_worker_process(options, undisturbed, tmp_path):
    out = tmp_path / "data"
    process = start(options, out, 3, stderr=subprocess.PIPE)
    job = Job.plan(config_of(options, out))
    scan = next(phase for phase in phases(job) if phase.name == "scan")
    while process.poll() is None and not finished_tasks(job, scan):
        time.sleep(0.001)
    workers = [worker for child in children(process.pid) for worker in children(child)]
    os.kill(workers[0], signal.SIGKILL)
    _, message = process.communicate(timeout=100)
    assert process.returncode == 1
    assert b"was killed" in message
    assert b"Traceback" not in message
    assert not out.exists()
    assert start(options, out, 2).wait() == 0
    assert folder_hash(out) == undisturbed


INTERRUPTIBLE = """
import sys
from recurrent_depth.cli import main
try:
    sys.exit(main())
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.slow
@pytest.mark.parametrize("group", [True, False])
def test_prepare_prints_no_traceback_on_interrupt_and_continues(options, undisturbed, tmp_path, group):
    """Ctrl-C in a terminal reaches all processes, `kill -INT` only the first one."""
    out = tmp_path / "data"
    command = [sys.executable, "-c", INTERRUPTIBLE, "prepare", "--config", str(options), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--workers", "3"], stderr=subprocess.PIPE, start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    job = Job.plan(config_of(options, out))
    scan = next(phase for phase in phases(job) if phase.name == "scan")
    while process.poll() is None and not finished_tasks(job, scan):
        time.sleep(0.001)
    (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in message
    assert not out.exists()
    prepare(config_of(options, out))
    assert folder_hash(out) == undisturbed


def children(pid):
    """Return the ids of child processes. The command starts a fork server, which starts the workers."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    try:
        return [int(child) for task in tasks for child in task.read_text().split()]
    except FileNotFoundError:
        return []


def start(options, out, workers, stderr=subprocess.DEVNULL):
    command = [sys.executable, "-m", "recurrent_depth.cli", "prepare", "--config", str(options), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [*command, "--workers", str(workers)], env=environment, stderr=stderr, start_new_session=True
    )


def finished_tasks(job, phase):
    return len(list((job.work.folder / "results" / phase.name).glob("*.json"))) if phase else 0
