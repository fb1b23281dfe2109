"""`recurrent-depth prepare`: documents become tokens, tokens become packed parquet rows with a manifest.

The work is done in a folder beside `out` whose name ends in `.unfinished`. After a kill at any moment the same command
continues it, and the result is the same to the last bit.
"""

import json
import shutil
import time
from contextlib import ExitStack
from typing import Any

from recurrent_depth.data.config import PrepareConfig, SlurmConfig
from recurrent_depth.data.layout import MANIFEST, DataError, ResumableError
from recurrent_depth.data.preparation.encoding import check_chat_tokens
from recurrent_depth.data.preparation.executors import check_executor, datatrove_executors, run_here
from recurrent_depth.data.preparation.filters import check_filters
from recurrent_depth.data.preparation.job import Job
from recurrent_depth.data.preparation.report import summary
from recurrent_depth.data.preparation.sources import SUFFIXES
from recurrent_depth.data.preparation.work import JOB_FILE
from recurrent_depth.data.records import describe_counts
from recurrent_depth.data.tokenizer import load_tokenizer
from recurrent_depth.files import FolderInUseError, check_new_folder, explain_full_disk, output_folder, write_json
from recurrent_depth.terminal import print_line

__all__ = ["PrepareConfig", "SlurmConfig", "prepare"]

LOCK_PATIENCE_S = 3.0
"""Seconds to wait for the lock: worker processes of a killed run need a moment to end."""


def prepare(config: PrepareConfig) -> dict[str, Any] | None:
    """Write the data set of `config` and return its manifest, or None if Slurm runs the tasks and finishes later.

    Raises:
        FileExistsError: if `out` exists.
        DataError: if a source cannot be read, has changed, or holds too little, or unfinished work has other options.
        OSError: if the disk is full; finished tasks are kept.
    """
    job = Job.plan(config)
    if not (job.finished and job.work.folder.exists()):  # both are there when Slurm's jobs have ended
        check_new_folder(config.out)
    _check(job)
    new = job.work.is_empty() or config.restart
    _announce(job, new)
    with ExitStack() as stack:
        _take_folder(job, stack)
        stack.enter_context(explain_full_disk(job.work.folder))
        _begin(job)
        try:
            waiting = not job.finished and _run(job)
        except ResumableError:
            raise
        except ValueError:
            if new:  # the same options would fail again
                job.work.clear()
            raise
    if waiting:
        return None
    shutil.rmtree(job.work.folder)
    manifest = json.loads((job.out / MANIFEST).read_text())
    print_line(summary(job.out, manifest))
    return manifest


def _check(job: Job) -> None:
    """Raise for what cannot work, before anything is written."""
    config = job.config
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
        if any(source.chat_formatted for source in job.sources):
            check_chat_tokens(tokenizer)
    check_filters(config.filters)
    check_executor(config.executor)
    job.work.check_own()


def _announce(job: Job, new: bool) -> None:
    sources = f"{len(job.sources):,} source{'s' if len(job.sources) > 1 else ''} in {len(job.parts):,} parts"
    start = "prepare" if new else "prepare, continued"
    print_line(f"{start}: {sources} -> {job.out}, rows of {job.config.sequence_length:,} tokens")
    for source, skipped in zip(job.sources, job.skipped, strict=True):
        if skipped:
            kinds = describe_counts(skipped)
            print_line(f"warning: {source.address}: not read are {kinds}; prepare reads {', '.join(SUFFIXES)}")


def _take_folder(job: Job, stack: ExitStack) -> None:
    """Create and lock the folder of the work."""
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            stack.enter_context(output_folder(job.work.folder))
            return
        except FolderInUseError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _begin(job: Job) -> None:
    """Write down what is prepared, or check that the unfinished work is the same."""
    if job.config.restart:
        job.work.clear()
    job.work.delete_partial_files()
    file, identity = job.work.path(JOB_FILE), json.loads(json.dumps(job.identity()))
    if not file.exists():
        write_json(file, identity, indent=None)
    try:
        found = json.loads(file.read_text())
        options, parts = dict(found["options"]), found["parts"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged ({error}); use --restart true to start over") from error
    if options != identity["options"]:
        names = [name for name, value in identity["options"].items() if options.get(name) != value]
        raise DataError(
            f"{job.work.folder} holds unfinished work with other options ({', '.join(names)}); use the same options "
            "to continue, or --restart true to start over"
        )
    if parts != identity["parts"]:
        raise DataError(
            f"the sources have changed since the work in {job.work.folder} began; restore them to continue, or use "
            "--restart true to start over"
        )


def _run(job: Job) -> bool:
    """Run or submit all tasks. Return True if they run later."""
    if job.config.executor == "local":
        run_here(job)
        return False
    executors = datatrove_executors(job)
    if job.config.executor == "slurm":
        executors[-1].run()  # launches those it depends on first
        print_line(
            f"submitted to Slurm; when all jobs have ended, {job.out} exists and the same command cleans up "
            f"(logs: {job.work.folder / 'logs'})"
        )
        return True
    for executor in executors:
        executor.run()
    return False
