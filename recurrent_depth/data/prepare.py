"""`recurrent-depth prepare`: documents -> tokens -> packed parquet rows, with a manifest.

The work lies beside `out`, in a folder whose name ends in `.unfinished`, until it is whole. Killed at any moment, the
same command goes on where it was, and the result is the same to the last bit.
"""

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console

from recurrent_depth.data.config import PrepareConfig, SlurmConfig
from recurrent_depth.data.executors import datatrove_executors, run_here
from recurrent_depth.data.job import Job
from recurrent_depth.data.layout import MANIFEST, DataError
from recurrent_depth.data.report import summary

__all__ = ["PrepareConfig", "SlurmConfig", "prepare"]

_PATIENCE = 3.0  # seconds


def prepare(config: PrepareConfig) -> dict[str, Any] | None:
    """Write the data set of `config`.

    Returns its manifest, or None where the tasks were handed to Slurm and will finish later.

    Raises:
        FileExistsError: `out` exists.
        DataError: a source cannot be read, has changed, or holds too little; or unfinished work has other options.
        OSError: the disk is full; what is finished stays.
    """
    job = Job.plan(config)
    if job.out.exists() and not job.work.folder.exists():
        raise FileExistsError(f"{config.out} exists; choose another --out or remove it")
    with _alone(job):
        _begin(job)
        try:
            waiting = not job.out.exists() and _run(job)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(
                errno.ENOSPC,
                f"{os.strerror(errno.ENOSPC)} while writing to {job.work.folder}; free some and run the same command "
                "again: finished parts are kept",
            ) from error
    if waiting:
        return None
    shutil.rmtree(job.work.folder)
    manifest = json.loads((job.out / MANIFEST).read_text())
    Console(stderr=True).print(summary(job.out, manifest), soft_wrap=True)
    return manifest


def _run(job: Job) -> bool:
    """Run or hand over all tasks; returns whether they are still to come."""
    if job.config.executor == "local":
        run_here(job)
        return False
    executors = datatrove_executors(job)
    if job.config.executor == "slurm":
        executors[-1].run()  # launches those it depends on first
        Console(stderr=True).print(
            f"handed to Slurm; when all jobs are done, {job.out} is there and the same command cleans up "
            f"(logs: {job.work.folder / 'logs'})"
        )
        return True
    for executor in executors:
        executor.run()
    return False


def _begin(job: Job) -> None:
    """Note what is prepared, or check that the unfinished work is the same."""
    file, identity = job.work.path("job.json"), json.loads(json.dumps(job.identity()))
    if file.exists() and job.config.restart:
        for path in job.work.folder.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not file.exists():
        with job.work.whole_file(file) as temporary:
            temporary.write_text(json.dumps(identity))
    shutil.rmtree(job.work.folder / "temporary", ignore_errors=True)
    found = json.loads(file.read_text())
    if found["options"] != identity["options"]:
        names = [name for name, value in identity["options"].items() if found["options"].get(name) != value]
        raise DataError(
            f"{job.work.folder} holds unfinished work with other options ({', '.join(names)}); use the same ones to go "
            "on, or --restart true to begin anew"
        )
    if found["parts"] != identity["parts"]:
        raise DataError(
            f"the sources have changed since the work in {job.work.folder} began; restore them to go on, or "
            "--restart true to begin anew"
        )


@contextmanager
def _alone(job: Job) -> Iterator[None]:
    """No other process prepares the same folder meanwhile; children of a killed one get a moment to end."""
    with job.work.path("lock").open("w") as lock:
        deadline = time.monotonic() + _PATIENCE
        while not _locked(lock):
            if time.monotonic() > deadline:
                raise DataError(f"another process is preparing {job.out}; wait for it")
            time.sleep(0.05)
        yield


def _locked(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
