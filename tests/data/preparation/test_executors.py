"""Executors of `prepare`: local processes and Ray (if installed) run for real, Slurm by its generated scripts."""

import dataclasses
import json
import os
import signal
import stat
import subprocess
import sys
import time

import pytest
from test_restart import WORDS, folder_hash

from recurrent_depth.data.config import PrepareConfig, SlurmConfig
from recurrent_depth.data.preparation.command import prepare
from recurrent_depth.data.preparation.executors import datatrove_executors
from recurrent_depth.data.preparation.job import Job
from recurrent_depth.data.preparation.phases import phases

pytest.importorskip("datatrove")


@pytest.fixture
def corpus(tmp_path):
    """Return a folder of four JSONL files. Each becomes one part."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for file in range(4):
        texts = [" ".join(WORDS[(file * 7 + n * k) % len(WORDS)] for k in range(1, 80)) for n in range(60)]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def config_for(corpus, out, **changes):
    options = {"vocab_size": 500, "sequence_length": 64, "part_bytes": 30_000, "files": 3, "validation_share": 0.3}
    return PrepareConfig(out=str(out), source=[str(corpus)], **(options | changes))


@pytest.mark.slow
def test_executors_write_identical_files(corpus, tmp_path):
    prepare(config_for(corpus, tmp_path / "one"))
    expected = folder_hash(tmp_path / "one")
    prepare(config_for(corpus, tmp_path / "processes", workers=3))
    assert folder_hash(tmp_path / "processes") == expected
    prepare(config_for(corpus, tmp_path / "datatrove", executor="datatrove", workers=4))
    assert folder_hash(tmp_path / "datatrove") == expected


@pytest.mark.slow
def test_killed_datatrove_executor_repeats_only_unfinished_tasks(corpus, tmp_path):
    prepare(config_for(corpus, tmp_path / "expected"))
    config = config_for(corpus, tmp_path / "data", executor="datatrove", workers=1)
    job = Job.plan(config)
    assert len(job.parts) == 4
    arguments = ["--source", str(corpus), "--out", config.out, "--executor", "datatrove"]
    for name in ("vocab_size", "sequence_length", "part_bytes", "files", "validation_share"):
        arguments += [f"--{name}", str(getattr(config, name))]
    process = subprocess.Popen(
        [sys.executable, "-m", "recurrent_depth.cli", "prepare", *arguments], stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, start_new_session=True,
    )  # fmt: skip
    completions = job.work.folder / "logs" / "pack" / "completions"
    while process.poll() is None and not (completions.is_dir() and any(completions.iterdir())):
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = len(list(completions.iterdir()))
    assert 1 <= done < 4
    executor = datatrove_executors(job)[[phase.name for phase in phases(job)].index("pack")]
    assert len(executor.get_incomplete_ranks()) == 4 - done
    prepare(config)
    assert folder_hash(tmp_path / "data") == folder_hash(tmp_path / "expected")


def test_slurm_executor_chains_jobs_and_writes_identical_files(corpus, tmp_path, monkeypatch, capsys):
    calls = tmp_path / "calls"
    command(tmp_path, "sbatch", f'echo "$@" >> {calls}; echo Submitted batch job $(wc -l < {calls})')
    command(tmp_path, "scontrol", "echo node1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    slurm = SlurmConfig(partition="nodes", time="01:00:00", mem_per_cpu_gb=7, environment="source env/bin/activate")
    config = config_for(corpus, tmp_path / "data", executor="slurm", workers=2, slurm=slurm)
    assert prepare(config) is None
    assert "submitted to Slurm" in capsys.readouterr().err
    logs = tmp_path / "data.unfinished" / "logs"
    script = (logs / "pack" / "launch_script.slurm").read_text()
    for line in ("partition=nodes", "time=01:00:00", "mem-per-cpu=7G", "array=0-3%2", "job-name=prepare-pack"):
        assert f"#SBATCH --{line}\n" in script
    assert "source env/bin/activate\n" in script
    assert f"launch_pickled_pipeline {logs}/pack/executor.pik" in script
    submitted = [call for call in calls.read_text().splitlines() if "--dependency=" in call]
    depends = [call.split("--dependency=")[1].split()[0] for call in submitted]
    names = [phase.name for phase in phases(Job.plan(config))]
    assert len(depends) == len(names) - 1  # every phase but the first depends on the previous one
    assert all(what.startswith("afterok:") for what in depends)
    assert not (tmp_path / "data").exists()

    # Run every task of every phase as the launch script does on a Slurm node.
    for name in names:
        tasks = json.loads((logs / name / "ranks_to_run.json").read_text())
        for task in tasks:
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
            monkeypatch.setenv("SLURM_NODELIST", "node1")
            pickled(logs / name / "executor.pik").run()
    assert prepare(config) == json.loads(
        (tmp_path / "data" / "manifest.json").read_text()
    )  # the same command removes the work folder
    assert not (tmp_path / "data.unfinished").exists()
    prepare(config_for(corpus, tmp_path / "expected"))
    assert folder_hash(tmp_path / "data") == folder_hash(tmp_path / "expected")


def command(tmp_path, name, line):
    """Write an executable shell script to tmp_path/bin."""
    file = tmp_path / "bin" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/bin/sh\n{line}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def pickled(file):
    """Return the executor in a pickle file, loaded as datatrove's launcher loads it."""
    import dill

    with file.open("rb") as content:
        return dill.load(content)


def test_ray_executors_cover_every_phase(corpus, tmp_path):
    config = dataclasses.replace(config_for(corpus, tmp_path / "data"), executor="ray", workers=2)
    executors = datatrove_executors(Job.plan(config))
    assert [type(executor).__name__ for executor in executors] == ["RayPipelineExecutor"] * 5
    assert [executor.tasks for executor in executors] == [1, 4, 1, 4, 1]


@pytest.mark.slow
def test_ray_executor_writes_identical_files(corpus, tmp_path):
    ray = pytest.importorskip("ray", reason="Ray is not part of the development environment")
    prepare(config_for(corpus, tmp_path / "expected"))
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        slurm = SlurmConfig(cpus_per_task=1, mem_per_cpu_gb=1)
        prepare(config_for(corpus, tmp_path / "data", executor="ray", workers=2, slurm=slurm))
    finally:
        ray.shutdown()
    assert folder_hash(tmp_path / "data") == folder_hash(tmp_path / "expected")
