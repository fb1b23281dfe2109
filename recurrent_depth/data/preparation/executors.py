"""Run the tasks of a preparation: on this machine, in processes, or by datatrove on many machines."""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from recurrent_depth.data.config import Executor
from recurrent_depth.data.layout import DataError, ResumableError
from recurrent_depth.data.preparation.job import Job
from recurrent_depth.data.preparation.phases import Phase, phases, run_task
from recurrent_depth.extras import require

if TYPE_CHECKING:
    from datatrove.executor.base import PipelineExecutor


def check_executor(executor: Executor) -> None:
    """Raise if what runs the tasks is not installed."""
    if executor != "local":
        require("datatrove", "recurrent-depth[data]", f"executor {executor}")
    if executor == "ray":
        require("ray", "datatrove[ray]", "executor ray")
    if executor == "slurm" and shutil.which("sbatch") is None:
        raise DataError("executor slurm submits with sbatch, which is not on the PATH; run prepare on a login node")


def run_here(job: Job) -> None:
    """Run all tasks on this machine, in `workers` processes; with one worker, in this process."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for phase in phases(job):
            waiting = [task for task in range(phase.tasks) if not job.work.done(phase.name, task)]
            bar = progress.add_task(phase.name, total=phase.tasks, completed=phase.tasks - len(waiting))
            advance = partial(progress.advance, bar)
            start = time.monotonic()
            if job.config.workers == 1 or len(waiting) == 1:
                for task in waiting:
                    run_task(job, phase.name, task)
                    advance()
            elif waiting:
                _run_in_processes(job, phase, waiting, advance)
            if waiting:
                tasks = f", {len(waiting):,} tasks" if len(waiting) > 1 else ""
                progress.console.print(f"{phase.name}: {time.monotonic() - start:.1f} s{tasks}", highlight=False)


def _run_in_processes(job: Job, phase: Phase, waiting: list[int], advance: Any) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["recurrent_depth.data.preparation.phases"])
    workers = min(job.config.workers, len(waiting))
    with ProcessPoolExecutor(workers, context, initializer=_start_process, initargs=(job, os.getpid())) as pool:
        try:
            for done in as_completed([pool.submit(_run_task, phase.name, task) for task in waiting]):
                done.result()
                advance()
        except BrokenProcessPool as error:
            raise ResumableError(
                f"a process of the phase {phase.name} was killed, perhaps because memory ran out; run the same command "
                "again to continue, with fewer --workers or more --files"
            ) from error
        except KeyboardInterrupt:  # the rest of a task may take minutes; it is repeated
            for process in multiprocessing.active_children():
                process.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


_job: Job | None = None


def _start_process(job: Job, parent: int) -> None:
    """Initialise a worker process: store the job, use one core, and end when the parent process is gone."""
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent is gone."""
    while True:
        time.sleep(0.2)
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            os._exit(1)


def _run_task(phase: str, task: int) -> None:
    assert _job is not None
    run_task(_job, phase, task)


def datatrove_executors(job: Job) -> "list[PipelineExecutor]":
    """Return datatrove's executor of each phase, in order; each waits for the one before.

    They keep their logs and completions beside the results of the tasks.
    """
    from recurrent_depth.data.preparation.datatrove_steps import TaskStep

    config, slurm = job.config, job.config.slurm
    kind = {"slurm": "Slurm", "ray": "Ray"}.get(config.executor, "Local")
    executor = getattr(import_module(f"datatrove.executor.{kind.lower()}"), f"{kind}PipelineExecutor")
    shared: dict[str, Any] = {}
    if config.executor in ("slurm", "ray"):
        shared |= {"cpus_per_task": slurm.cpus_per_task, "mem_per_cpu_gb": slurm.mem_per_cpu_gb}
    if config.executor == "slurm":
        shared |= {"partition": slurm.partition, "time": slurm.time, "qos": slurm.qos or ""}
        shared["env_command"] = slurm.environment or None
    executors: list[PipelineExecutor] = []
    for phase in phases(job):
        options = shared | {"tasks": phase.tasks, "workers": min(config.workers, phase.tasks)}
        if config.executor == "slurm":  # the others are run one after the other
            options |= {"job_name": f"prepare-{phase.name}", "depends": executors[-1] if executors else None}
        steps, logs = [TaskStep(job, phase.name)], str(job.work.path("logs", phase.name))
        executors.append(executor(pipeline=steps, logging_dir=logs, **options))
    return executors
