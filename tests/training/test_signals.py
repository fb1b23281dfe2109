"""A run that is asked to stop saves first, on all ranks at the same training step, and can be resumed.

SIGNAL_TRIALS sets how many random moments are tried (20 for a release).
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import recurrent_depth.training.trainer as trainer_module
from recurrent_depth.cli import main
from recurrent_depth.runs import checkpoints
from recurrent_depth.training.checkpoint import CheckpointWriter
from recurrent_depth.training.config import CheckpointConfig, ValidationConfig
from recurrent_depth.training.launch import train
from recurrent_depth.training.parallel import Ranks
from recurrent_depth.training.trainer import Trainer
from support import assert_equal_runs, changed_loss, losses, run_ranks, small_run


def train_with_signal(config, step: int, rank: int, number: int) -> None:
    """Train; rank `rank` gets the signal in the middle of training step `step`."""
    sent = []

    def send(trainer, loss):
        if trainer.step == step and int(os.environ["RANK"]) == rank and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return loss

    with changed_loss(send):
        train(config, resume=True)


def train_on(config) -> None:
    train(config, resume=True)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "number"),
    [(1, signal.SIGINT), pytest.param(1, signal.SIGUSR1, marks=pytest.mark.slow), (2, signal.SIGTERM)],
)
def test_signal_saves_and_exits_cleanly(tmp_path, world_size, number):
    config = small_run(tmp_path / "stopped")
    assert run_ranks(train_with_signal, world_size, config, 5, world_size - 1, number) == [0] * world_size
    assert checkpoints(tmp_path / "stopped")[-1].name == "step-00000006"
    assert len(losses(tmp_path / "stopped")) == 6
    assert run_ranks(train_on, world_size, config) == [0] * world_size
    assert run_ranks(train_on, world_size, small_run(tmp_path / "whole")) == [0] * world_size
    assert_equal_runs(tmp_path / "stopped", tmp_path / "whole")


LAST_CALL = {  # of a run of twelve steps; milliseconds for any time
    "before the reduction": 30, "between the reduction and the loop's check": 11, "during validation": 3,
    "during a save": 5, "while waiting for a save": 5, "any time": 3000,
}  # fmt: skip
MOMENTS = {
    "before the reduction": (Ranks, "all_reduce", "before"),
    "between the reduction and the loop's check": (Trainer, "train_step", "after"),
    "during validation": (trainer_module, "validate", "before"),
    "during a save": (CheckpointWriter, "save", "after"),
    "while waiting for a save": (CheckpointWriter, "wait", "before"),
}


def train_with_signal_at(config, moment: str, call: int, victims: tuple[int, ...]) -> None:
    """Train; the victims get SIGTERM at the `call`-th call of a moment, or after `call` milliseconds of training."""
    rank = int(os.environ["RANK"])

    def send():
        if rank in victims:
            os.kill(os.getpid(), signal.SIGTERM)

    owner, name, when = MOMENTS.get(moment, (Trainer, "fit", "before"))
    original, calls = getattr(owner, name), [0]

    def watched(*args, **kwargs):
        calls[0] += 1
        if moment not in MOMENTS:
            threading.Timer((call + rank * 7) / 1000, send).start()
        elif calls[0] == call and when == "before":
            send()
        result = original(*args, **kwargs)
        if moment in MOMENTS and calls[0] == call and when == "after":
            send()
        return result

    setattr(owner, name, watched)
    train(config, resume=True)


def busy_run(out):
    """Return a run that mostly saves and validates, so that random moments fall into these."""
    validation = ValidationConfig(every=3, rows=8, num_steps=(1, 4))
    return small_run(out, checkpoint=CheckpointConfig(every=2), validation=validation)


@pytest.mark.distributed
@pytest.mark.parametrize("moment", ["between the reduction and the loop's check", "during a save"])
def test_signal_to_one_rank_stops_all_at_the_same_step(tmp_path, moment):
    config = small_run(tmp_path / "run")
    assert run_ranks(train_with_signal_at, 2, config, moment, 2, (1,), timeout=60) == [0, 0]
    stopped = len(losses(tmp_path / "run"))
    assert stopped < 12
    assert checkpoints(tmp_path / "run")[-1].name == f"step-{stopped:08d}"


@pytest.mark.slow
@pytest.mark.distributed
def test_signals_at_random_moments_save_and_resume_bitwise(tmp_path):
    assert run_ranks(train_on, 2, busy_run(tmp_path / "whole")) == [0, 0]
    rng = random.Random(12)
    for trial in range(int(os.environ.get("SIGNAL_TRIALS", 6))):
        moment = [*LAST_CALL][trial % len(LAST_CALL)]
        victims = [(0,), (1,), (0, 1)][(trial + trial // len(LAST_CALL)) % 3]
        call = rng.randint(1, LAST_CALL[moment])
        out = tmp_path / f"trial-{trial}"
        done = run_ranks(train_with_signal_at, 2, busy_run(out), moment, call, victims)
        assert done == [0, 0], (moment, call, victims)
        print(f"{moment}, time {call}, to rank(s) {victims}: saved at {checkpoints(out)[-1].name}")
        assert run_ranks(train_on, 2, busy_run(out)) == [0, 0]
        assert_equal_runs(out, tmp_path / "whole")


def run_with_interrupt(out, arguments: list[str], environment: dict[str, str]) -> subprocess.Popen:
    """Start training in a separate process group and send it Ctrl-C as a terminal does, after the first save."""
    options = ["--out", str(out), "--data.task.name", "shell_game", "--data.task.max_length", "8", "--steps", "100000"]
    options += ["--batch_size", "4", "--model.n_embd", "32", "--model.n_heads", "2", "--model.intermediate_size", "64"]
    options += ["--model.vocab_size", "64", "--model.block_size", "32", "--model.mean_recurrence", "4"]
    options += ["--model.mean_backprop_depth", "2", "--checkpoint.every", "5", "--runtime.device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, *arguments, *options], env=os.environ | environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not checkpoints(out) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    return process


def test_ctrl_c_saves_and_ends_with_one_line(tmp_path):
    process = run_with_interrupt(tmp_path / "run", ["-m", "recurrent_depth.cli", "train"], {})
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    step = int(checkpoints(tmp_path / "run")[-1].name[5:])
    assert errors.splitlines()[-1] == f"saved and stopped at step {step} of 100000; continue with --resume true"
    assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.distributed
def test_ctrl_c_under_torchrun_saves(tmp_path):
    """torchrun forwards the terminal's SIGINT to ranks that already got it; the second one must not end them."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    entry = str(Path(__file__).parents[2] / "train.py")
    process = run_with_interrupt(tmp_path / "run", [*launcher, entry], {"OMP_NUM_THREADS": "1"})
    _, errors = process.communicate(timeout=90)
    (line,) = [line for line in errors.splitlines() if "saved and stopped at step" in line]
    assert line.split()[5] == str(int(checkpoints(tmp_path / "run")[-1].name[5:]))


def test_finished_run_prints_that_it_is_finished(tmp_path, capsys):
    train(small_run(tmp_path / "run"))
    before = losses(tmp_path / "run")
    capsys.readouterr()
    train(small_run(tmp_path / "run"), resume=True)
    assert "is finished: step 12 of 12; " in capsys.readouterr().err
    assert losses(tmp_path / "run") == before


def test_run_prints_what_it_starts(tmp_path, capsys):
    options = ["--out", str(tmp_path / "run"), "--data.task.name", "shell_game", "--steps", "1", "--batch_size", "4"]
    options += ["--model.n_embd", "32", "--model.n_heads", "2", "--model.intermediate_size", "64"]
    options += ["--model.vocab_size", "64", "--model.block_size", "32", "--runtime.device", "cpu"]
    assert main(["train", *options, "--validation.rows", "4"]) == 0
    first = capsys.readouterr().err.splitlines()[0]
    for part in ("training", "parameters on shell_game", "4 rows", "cpu (float32)", "steps 0 to 1", str(tmp_path)):
        assert part in first


@pytest.mark.parametrize(("seconds_left", "steps"), [(30, 1), (3600, 12)])
def test_slurm_job_saves_before_its_end(tmp_path, monkeypatch, seconds_left, steps):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + seconds_left))
    train(small_run(tmp_path / "run", slurm_margin_minutes=1.0))
    assert len(losses(tmp_path / "run")) == steps
    assert checkpoints(tmp_path / "run")[-1].name == f"step-{steps:08d}"


def test_time_limit_saves_and_stops(tmp_path):
    config = small_run(tmp_path / "run", max_hours=1e-9)
    train(config)
    assert checkpoints(tmp_path / "run")[-1].name == "step-00000001"


def train_with_deadline_on(config, rank: int) -> None:
    """Train; the deadline passes on one rank only (Slurm tells each node separately)."""
    if int(os.environ["RANK"]) == rank:
        os.environ["SLURM_JOB_END_TIME"] = str(int(time.time()))
    train(config)


@pytest.mark.distributed
def test_deadline_on_one_rank_stops_all(tmp_path):
    assert run_ranks(train_with_deadline_on, 2, small_run(tmp_path / "run"), 1) == [0, 0]
    assert checkpoints(tmp_path / "run")[-1].name == "step-00000001"
