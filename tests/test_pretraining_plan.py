"""Planned memory and communication of a run against real ranks, and the output of the command."""

import dataclasses
import json
import os

import pytest

from live_memory import LiveMemory
from recurrent_depth.cli import main
from recurrent_depth.data.config import DataConfig, TaskDataConfig
from recurrent_depth.model.config import SHAPES, GateConfig, ModelConfig
from recurrent_depth.model.flops import training_flops
from recurrent_depth.planning.devices import DEVICES
from recurrent_depth.planning.pretraining import Job, communication, fits, memory, remedies, throughput
from recurrent_depth.training.config import DepthRampConfig, OptimizerConfig, RuntimeConfig
from recurrent_depth.training.objective import micro_step_flops
from recurrent_depth.training.objective_config import (
    EveryConfig,
    GatedConfig,
    LabelledConfig,
    ObjectiveConfig,
    SelfDistilledConfig,
)
from recurrent_depth.training.optimizer import local_shard
from recurrent_depth.training.parallel import start_processes
from recurrent_depth.training.trainer import Trainer
from support import run_ranks, small_run

TOKENS = 64
MODEL = ModelConfig(
    n_embd=128, n_heads=4, intermediate_size=352, vocab_size=1024, n_layers_in_recurrent_block=2, block_size=TOKENS,
    mean_recurrence=6, mean_backprop_depth=3, sampling_scheme="fixed",
)  # fmt: skip


def wide_run(out, optimizer="huginn", micro_steps=1, **runtime):
    return small_run(
        out,
        model=MODEL,
        data=DataConfig(task=TaskDataConfig(name="shell_game", min_length=TOKENS - 1, max_length=TOKENS - 1)),
        micro_steps=micro_steps,
        optimizer=OptimizerConfig(name=optimizer),
        runtime=RuntimeConfig(**{"device": "cpu", "threads": 1, "dtype": "bfloat16", "kernels": "torch"} | runtime),
    )


def measured_peak(config) -> int:
    """Return the peak bytes of one rank in its second training step."""
    trainer = Trainer(config, start_processes(config.runtime))
    trainer.train_step()
    moments = [value for p in trainer.parameters for value in trainer.optimizer.state[p].values()]
    with LiveMemory(*(local_shard(tensor.detach()) for tensor in [*trainer.model.parameters(), *moments])) as live:
        trainer.train_step()
    return live.peak


def measure(out, cases):
    peaks = {name: measured_peak(config) for name, config in cases.items()}
    if os.environ["RANK"] == "0":
        (out / "peaks.json").write_text(json.dumps(peaks))


def assert_planned(out, world_size, cases):
    assert run_ranks(measure, world_size, out, cases) == [0] * world_size
    for name, peak in json.loads((out / "peaks.json").read_text()).items():
        planned = sum(memory(Job(cases[name], world_size, TOKENS)).values())
        assert peak <= planned <= 1.15 * peak, (name, peak, planned)


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_planned_memory_of_one_process(tmp_path, micro_steps):
    config = wide_run(tmp_path, dtype="float32", micro_steps=micro_steps)
    peak = measured_peak(config)
    assert peak <= sum(memory(Job(config, 1, TOKENS)).values()) <= 1.1 * peak


OBJECTIVES = {
    "every": ObjectiveConfig(every=EveryConfig(reads=3)),
    "gated": ObjectiveConfig(gated=GatedConfig()),
    "self_distilled": ObjectiveConfig(self_distilled=SelfDistilledConfig()),
    "labelled": ObjectiveConfig(labelled=LabelledConfig()),
}


@pytest.mark.parametrize("chunk", [None, 64])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_planned_memory_of_objectives(tmp_path, name, chunk):
    config = dataclasses.replace(
        wide_run(tmp_path, dtype="float32", loss_chunk_size=chunk),
        model=dataclasses.replace(MODEL, gate=GateConfig(input="state_and_change")), objective=OBJECTIVES[name],
        trainable="gate" if name == "labelled" else "all",
    )  # fmt: skip
    peak = measured_peak(config)
    assert 0.92 * peak <= sum(memory(Job(config, 1, TOKENS)).values()) <= 1.25 * peak


@pytest.mark.parametrize("executed", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_planned_flops_of_objectives(tmp_path, name, executed):
    config = dataclasses.replace(
        wide_run(tmp_path, activation_checkpointing="step", loss_chunk_size=32),
        model=dataclasses.replace(MODEL, gate=GateConfig()), objective=OBJECTIVES[name],
        trainable="gate" if name == "labelled" else "all",
    )  # fmt: skip
    expected = micro_step_flops(config, TOKENS, (3, 3), executed=executed) / TOKENS  # MODEL has this depth always
    speed = throughput(Job(config, 1, TOKENS), DEVICES["h100"], 0.5)
    assert (speed.executed if executed else speed.useful) == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
@pytest.mark.distributed
def test_planned_memory_of_two_ranks(tmp_path):
    cases = {
        "gathered": wide_run(tmp_path), "freed": wide_run(tmp_path, reshard_after_forward=True),
        "accumulated": wide_run(tmp_path, micro_steps=2, optimizer="muon"),
        "step": wide_run(tmp_path, activation_checkpointing="step", loss_chunk_size=64),
        "block": wide_run(tmp_path, micro_steps=2, activation_checkpointing="block", shard_size=1),
    }  # fmt: skip
    assert_planned(tmp_path, 2, cases)


def huginn(**changes):
    runtime = RuntimeConfig(
        **{"activation_checkpointing": "step", "loss_chunk_size": 2048} | changes.pop("runtime", {})
    )
    return small_run(
        "run", model=SHAPES["huginn-3.5b"], **{"batch_size": 4096, "micro_steps": 32} | changes, runtime=runtime
    )


def test_planned_weights_and_moments_are_divided_by_the_ranks_that_share_them():
    parameters = 3_564_976_800
    parts = memory(Job(huginn(), 128, 4096))
    assert parts["weights (fp32)"] == 4 * parameters // 128
    parts = memory(Job(huginn(runtime={"shard_size": 8}), 128, 4096))
    assert parts["optimizer"] == 8 * parameters // 8
    assert parts["gathered weights"] == 2 * parameters


def test_remedies_make_a_run_fit():
    runtime = {"activation_checkpointing": "none", "loss_chunk_size": None, "kernels": "torch"}
    config = huginn(micro_steps=1024, runtime=runtime)
    job, device = Job(config, 4, 4096), DEVICES["a100"]
    assert not fits(job, device)
    changes = remedies(job, device)
    assert "--runtime.activation_checkpointing step" in changes
    fields = {text.split()[0].removeprefix("--runtime."): text.split()[1] for text in changes}
    parsed = {name: json.loads(v) if v[0].isdigit() or v in ("true", "null") else v for name, v in fields.items()}
    changed_run = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, **parsed))
    assert fits(Job(changed_run, 4, 4096), device)
    assert remedies(Job(changed_run, 4, 4096), device) == []


def test_planned_time_is_flops_over_peak_plus_bytes_over_links():
    job, device = Job(huginn(runtime={"shard_size": 8}), 128, 4096), DEVICES["h100"]
    speed, sent = throughput(job, device, 0.5), communication(job)
    assert speed.executed == pytest.approx(206e9, rel=0.02)  # 14.1 TFLOP per iteration of 4096 tokens, r = 33, k = 8
    assert speed.useful < speed.executed
    assert speed.compute_seconds == pytest.approx(speed.executed * 4096 * 4096 / 128 / (0.5 * 989e12))
    inside = (sent["gather"] + sent["reduce_scatter"]) * 7 / 8 / 450e9
    across = 2 * sent["all_reduce"] * 15 / 16 / 50e9
    assert speed.communication_seconds == pytest.approx((inside + across) / 0.7)
    total = speed.compute_seconds + speed.communication_seconds
    assert speed.tokens_per_second == pytest.approx(4096 * 4096 / total)


@pytest.mark.parametrize("ramp_steps", [40, 100, 250])
def test_planned_flops_of_a_depth_ramp_are_the_mean_over_its_depths(tmp_path, ramp_steps):
    model = dataclasses.replace(MODEL, sampling_scheme="fixed", mean_recurrence=32, mean_backprop_depth=4)
    run = small_run(tmp_path, model=model, steps=100, depth_ramp=DepthRampConfig(start=4, steps=ramp_steps))
    depths = [round(4 + 28 * min(1, step / ramp_steps)) for step in range(100)]
    executed = sum(training_flops(model, TOKENS, depth - 4, 4) for depth in depths) / 100
    assert throughput(Job(run, 1, TOKENS), DEVICES["h100"], 0.5).executed == pytest.approx(executed / TOKENS, rel=0.01)


def test_plan_command_plans_a_shipped_configuration(capsys):
    config = ["--run", "configs/pretrain/huginn-3.5b-h100.yaml", "--num-gpus", "128"]
    assert main(["plan", *config, "--utilisation", "0.5"]) == 0
    text = capsys.readouterr().out
    assert "It fits." in text
    assert "| tokens per training step, and of the run | 16,777,216 and 795,240,038,400 |" in text
    assert (
        main(["plan", *config, "--run.runtime.activation_checkpointing", "none", "--run.runtime.shard_size", "1"]) == 0
    )
    assert "It does not fit. It fits with --runtime.activation_checkpointing" in capsys.readouterr().out
    assert main(["plan", *config, "--device", "tpu"]) == 2
    assert "one of a100, h100" in capsys.readouterr().err
    assert main(["plan", *config[:2], "--num-gpus", "100"]) == 2
    assert "do not divide" in capsys.readouterr().err
