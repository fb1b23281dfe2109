"""Starting, resuming and extending runs: locks on run folders, and what a resume may change."""

import dataclasses
import os
import subprocess
import sys

import pytest

from recurrent_depth.data.config import DataConfig, TaskDataConfig
from recurrent_depth.files import output_folder
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.runs import CheckpointError, checkpoints
from recurrent_depth.training.checkpoint import check_steps, trajectory
from recurrent_depth.training.config import HealthConfig, OptimizerConfig, RunConfig, ValidationConfig
from recurrent_depth.training.health import TrainingAborted
from recurrent_depth.training.launch import train
from support import assert_equal_runs, changed_loss, losses, outcome, run_ranks, small_run

# -- one writer per folder -------------------------------------------------------------------------------------------


def train_in_use(config) -> None:
    outcome(os.path.dirname(config.out), train, config)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_run_folder_in_use_is_refused_on_every_rank(tmp_path, world_size):
    with output_folder(tmp_path / "run"):
        codes = run_ranks(train_in_use, world_size, small_run(tmp_path / "run"))
    assert 0 not in codes
    for rank in range(world_size):
        message = (tmp_path / f"outcome-{rank}.txt").read_text()
        assert message.startswith("FolderInUseError: ")
        assert f"run is in use by process {os.getpid()} on" in message
    assert os.listdir(tmp_path / "run") == [".lock"]


@pytest.mark.slow
def test_second_command_on_a_run_folder_is_refused(tmp_path):
    """The first run continues; the error of the second names the process that uses the folder."""
    arguments = [sys.executable, "-m", "recurrent_depth.cli", "train", "--out", str(tmp_path / "run")]
    arguments += [
        "--data.task.name",
        "shell_game",
        "--steps",
        "100000",
        "--model.vocab_size",
        "64",
        "--batch_size",
        "2",
    ]
    arguments += ["--model.n_embd", "32", "--model.n_heads", "2", "--model.intermediate_size", "64"]
    arguments += ["--model.block_size", "32", "--runtime.device", "cpu"]
    first = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    assert first.stderr is not None
    assert first.stderr.readline().startswith("training ")
    second = subprocess.run([*arguments, "--seed", "1"], capture_output=True, text=True, timeout=120)
    first.terminate()
    _, rest = first.communicate(timeout=60)
    assert second.returncode == 1
    assert f"in use by process {first.pid} on" in second.stderr
    assert "Traceback" not in second.stderr
    assert first.returncode == 0, rest
    assert "seed: 0" in (tmp_path / "run" / "run.yaml").read_text()


def test_refused_run_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match=r"model\.vocab_size"):
        train(small_run(tmp_path / "a" / "run", model=ModelConfig(vocab_size=8)))
    assert os.listdir(tmp_path) == []


# -- what a resume may change ----------------------------------------------------------------------------------------


def test_new_option_may_not_change_in_a_resume(tmp_path):
    """A new option is taken to affect the result unless it is listed in MAY_CHANGE."""

    @dataclasses.dataclass(frozen=True)
    class Newer(RunConfig):
        momentum_of_the_future: float = 0.5

    config = small_run(tmp_path)
    newer = Newer(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})
    assert trajectory(newer) == trajectory(config) | {"momentum_of_the_future": 0.5}
    assert {"model.n_embd", "optimizer.lr", "data.task.max_length", "seed", "spikes.factor"} <= trajectory(
        config
    ).keys()
    assert not {"steps", "out", "validation.rows", "runtime.device", "spikes.max_rewinds"} & trajectory(config).keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1}, {"batch_size": 4}, {"micro_steps": 1},
        {"data": DataConfig(task=TaskDataConfig("shell_game", 2, 7))},
        {"optimizer": OptimizerConfig(lr=1e-3, warmup_steps=3, cooldown_steps=3)},
    ],
)  # fmt: skip
def test_resume_refuses_and_names_options_that_affect_the_result(tmp_path, changes):
    config = small_run(tmp_path / "run", max_hours=1e-9)
    train(config)
    with pytest.raises(CheckpointError, match=f"{next(iter(changes))}.*was .*, is .*--init-from"):
        train(dataclasses.replace(config, **changes), resume=True)


def test_restart_by_torchrun_resumes_only_what_this_torchrun_began(tmp_path, monkeypatch):
    config = small_run(tmp_path / "run", max_hours=1e-9)  # ends after one training step
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-1")
    train(config)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train(config)
    assert len(losses(tmp_path / "run")) == 2
    for name, restarts in (("job-1", "0"), ("job-2", "0"), ("job-2", "1")):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        with pytest.raises(FileExistsError, match="already holds checkpoints; continue with --resume true"):
            train(config)
    assert len(losses(tmp_path / "run")) == 2
    train(config, resume=True)
    assert len(losses(tmp_path / "run")) == 3


HELD = OptimizerConfig(lr=2e-3, warmup_steps=3)
NO_CURRICULUM = DataConfig(task=TaskDataConfig("shell_game", min_length=2, max_length=8, curriculum_fraction=0.0))


@pytest.mark.parametrize("schedule", ["constant", "trapezoid"])
def test_extending_a_finished_run_is_exact(tmp_path, schedule):
    optimizer = dataclasses.replace(HELD, schedule=schedule)
    config = small_run(tmp_path / "extended", steps=6, data=NO_CURRICULUM, optimizer=optimizer)
    train(config)
    train(dataclasses.replace(config, steps=12), resume=True)
    train(small_run(tmp_path / "whole", data=NO_CURRICULUM, optimizer=optimizer))
    assert_equal_runs(tmp_path / "extended", tmp_path / "whole")


def test_extending_a_run_before_its_cooldown_is_exact(tmp_path):
    config = small_run(tmp_path / "extended", steps=9, data=NO_CURRICULUM)  # cooldown: the last 3 steps
    with changed_loss(lambda trainer, loss: (setattr(trainer, "stop_requested", trainer.step == 4), loss)[1]):
        train(config)
    assert len(losses(tmp_path / "extended")) == 5
    train(dataclasses.replace(config, steps=12), resume=True)
    train(small_run(tmp_path / "whole", data=NO_CURRICULUM))
    assert_equal_runs(tmp_path / "extended", tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "words", "first"),
    [
        ({"optimizer": OptimizerConfig(lr=2e-3, warmup_steps=3, cooldown_steps=3)}, "schedule trapezoid", 3),
        ({"optimizer": dataclasses.replace(HELD, schedule="linear")}, "schedule linear", 3),
        ({"optimizer": dataclasses.replace(HELD, schedule="cosine")}, "schedule cosine", 3),
        ({"data": DataConfig(task=TaskDataConfig("shell_game", min_length=2, max_length=8))}, "curriculum_fraction", 1),
    ],
)
def test_inexact_extension_is_refused_with_alternatives(tmp_path, changes, words, first):
    config = small_run(tmp_path / "run", **({"steps": 6, "data": NO_CURRICULUM, "optimizer": HELD} | changes))
    train(config)
    with pytest.raises(CheckpointError, match=f"steps was 6, is 12.*{words}.*from step {first} on") as caught:
        train(dataclasses.replace(config, steps=12), resume=True)
    assert f"checkpoint up to step {first}" in str(caught.value)
    assert f"--init-from {config.out} --out NEW" in str(caught.value)


def test_finished_run_says_how_to_continue(tmp_path, capsys):
    held = small_run(tmp_path / "held", steps=2, data=NO_CURRICULUM, optimizer=HELD)
    decayed = small_run(tmp_path / "decayed", steps=6, data=NO_CURRICULUM)  # cooldown: the last 3 steps
    for config in (held, decayed):
        train(config)
        capsys.readouterr()
        train(config, resume=True)
        said = " ".join(capsys.readouterr().err.split())
        if config is held:
            assert "is finished: step 2 of 2; raise --steps to train on" in said
        else:
            assert "is finished: step 6 of 6; it cannot be continued with more steps, since the learning rate" in said
            assert "checkpoint up to step 3" in said
            assert f"--init-from {config.out} --out NEW" in said


def test_resume_refuses_fewer_steps_than_trained(tmp_path):
    config = small_run(tmp_path, data=NO_CURRICULUM, optimizer=HELD)
    with pytest.raises(CheckpointError, match=r"steps is 12, but .* already trained 20"):
        check_steps(config, done=20, planned=20)
    check_steps(config, done=12, planned=20)


# -- counters ----------------------------------------------------------------------------------------------------------


def test_failed_health_checks_are_counted_across_resumes(tmp_path):
    every_state = HealthConfig(collapse_correlation=-1.0, collapse_checks=4)  # any correlation is a collapse
    every_step = ValidationConfig(every=1, rows=8, num_steps=(1,))
    config = small_run(tmp_path / "run", health=every_state, validation=every_step, max_hours=1e-9)
    for _ in range(3):
        train(config, resume=True)  # one step each
    with pytest.raises(TrainingAborted, match=r"step 4: .* collapsed"):
        train(config, resume=True)


def test_skipped_steps_are_counted_across_resumes(tmp_path):
    config = small_run(tmp_path / "run", health=HealthConfig(skipped_steps=4), log_every=1)

    def train_some(stop: int) -> None:
        def change(trainer, loss):
            trainer.stop_requested = trainer.step + 1 == stop
            return loss * float("nan") if trainer.step >= 4 else loss

        with changed_loss(change):
            train(config, resume=True)

    train_some(6)  # steps 4 and 5 are skipped
    with pytest.raises(TrainingAborted, match=r"step 8: .* not finite for 4 steps in a row"):
        train_some(0)


def test_run_with_only_skipped_steps_can_be_resumed(tmp_path):
    """Such a run has no moments yet; the first gradient creates them, also after a resume."""

    def train_with_nan(out, stop: int) -> None:
        def change(trainer, loss):
            trainer.stop_requested = trainer.step + 1 == stop
            return loss * float("nan") if trainer.step < 2 else loss

        with changed_loss(change):
            train(small_run(out), resume=True)

    train_with_nan(tmp_path / "whole", 0)
    train_with_nan(tmp_path / "stopped", 1)
    train_with_nan(tmp_path / "stopped", 0)
    assert losses(tmp_path / "stopped")[2:] == losses(tmp_path / "whole")[2:]
    assert checkpoints(tmp_path / "stopped")[-1].name == "step-00000012"
