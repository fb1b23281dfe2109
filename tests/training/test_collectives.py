"""Communication of a training step: the same at 9 core iterations as at 2, and once per training step."""

import dataclasses
import json
import os
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from collectives import counted
from recurrent_depth.model.config import GateConfig
from recurrent_depth.planning.pretraining import Job, communication
from recurrent_depth.training.config import RuntimeConfig
from recurrent_depth.training.objective_config import EveryConfig, GatedConfig, ObjectiveConfig
from recurrent_depth.training.parallel import start_processes
from recurrent_depth.training.trainer import Trainer
from support import run_ranks, small_run

CPU = RuntimeConfig(device="cpu", dtype="float32", threads=1)
EVERY = ObjectiveConfig(every=EveryConfig(reads=2))
GATED = ObjectiveConfig(gated=GatedConfig())
BFLOAT16 = dataclasses.replace(CPU, dtype="bfloat16")


def config_of(out, depth=2, micro_steps=2, runtime=CPU, objective=ObjectiveConfig()):  # noqa: B008
    config = small_run(out, runtime=runtime, micro_steps=micro_steps)
    model = dataclasses.replace(
        config.model, mean_recurrence=depth, sampling_scheme="fixed", n_layers_in_recurrent_block=2,
        gate=GateConfig() if objective.trains_gate else None,
    )  # fmt: skip
    return dataclasses.replace(config, model=model, objective=objective)


def one_step(out, cases):
    """Write counts, loss, gradient norm, dtypes and gradients of a training step of every case."""
    results = {}
    for name, config in cases.items():
        trainer = Trainer(config, start_processes(config.runtime))
        trainer.train_step()  # the first forward pass of FSDP is lazy
        trainer.step = 0
        seen = watch(trainer)
        with counted() as counts:
            record = trainer.train_step()
        results[name] = {
            "counts": dict(counts), "loss": record["loss"], "norm": record["gradient_norm"], "dtypes": seen["dtypes"],
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
        }  # fmt: skip
        if os.environ["RANK"] == "0":
            save_file(seen["gradients"], out / f"{name}.safetensors")
    if os.environ["RANK"] == "0":
        (out / "results.json").write_text(json.dumps(results))


def watch(trainer):
    """Record the dtypes inside the core and of the state, and the whole gradients before the update."""
    seen = {"dtypes": {}, "gradients": {}}
    block = trainer.model.transformer.core_block[0]

    def in_core(module, args):
        x, rotary = args[:2]
        seen["dtypes"] |= {"state": x.dtype, "rotary": rotary[0].dtype, "weight": module.attn.Wqkv.weight.dtype}

    block.register_forward_pre_hook(in_core)
    update = trainer.optimizer.step

    def step():
        for name, p in trainer.model.named_parameters():
            gradient = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            seen["gradients"][name] = gradient.clone()
        update()
        p = trainer.parameters[0]
        moments = [value.dtype for key, value in trainer.optimizer.state[p].items() if key != "step"]
        seen["dtypes"] |= {"master": p.dtype, "gradient": p.grad.dtype, "moment": moments[0]}
        seen["dtypes"] = {key: str(value) for key, value in seen["dtypes"].items()}

    trainer.optimizer.step = step
    return seen


def measure(out, world_size, **runs):
    cases = {name: config_of(out / "run", **changes) for name, changes in runs.items()}
    assert run_ranks(one_step, world_size, out, cases) == [0] * world_size
    results = json.loads((out / "results.json").read_text())
    for name in results:
        results[name]["counts"] = Counter(results[name]["counts"])
        results[name]["gradients"] = load_file(out / f"{name}.safetensors")
    return results


def units(config):
    """Return the number of FSDP units: the blocks outside the loop, the whole core, and the root."""
    return config.model.n_layers_in_prelude + 1 + config.model.n_layers_in_coda + 1


def assert_same_numbers(a, b, tolerance=1e-5):
    assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
    for name in b["gradients"]:
        torch.testing.assert_close(a["gradients"][name], b["gradients"][name], rtol=1e-4, atol=tolerance)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("collectives")
    recomputed = {name: dataclasses.replace(CPU, activation_checkpointing=name) for name in ("step", "block")}
    freed = dataclasses.replace(BFLOAT16, reshard_after_forward=True)
    runs = {
        "shallow": {}, "deep": {"depth": 9}, "once": {"micro_steps": 1}, "step": {"runtime": recomputed["step"]},
        "block": {"runtime": recomputed["block"]}, "freed": {"runtime": freed},
        "freed_deep": {"depth": 9, "runtime": freed},
        "replicated": {"runtime": dataclasses.replace(CPU, shard_size=1)}, "bfloat16": {"runtime": BFLOAT16},
        "every": {"objective": EVERY}, "every_freed": {"objective": EVERY, "runtime": freed},
        "gated": {"objective": GATED, "runtime": BFLOAT16}, "gated_freed": {"objective": GATED, "runtime": freed},
    }  # fmt: skip
    return measure(out, 2, **runs)


@pytest.mark.distributed
def test_fsdp_units_gather_and_reduce_once_at_any_depth_and_accumulation(two_ranks):
    counts = two_ranks["shallow"]["counts"]
    assert counts["gathers"] == counts["reduces"] == units(config_of("run"))
    whole = 4 * two_ranks["shallow"]["parameters"]
    assert counts["all_gather_bytes"] == counts["reduce_scatter_bytes"] == whole  # all sizes divide by 2
    assert counts["all_reduce_bytes"] < 1000  # valid targets, loss, the optimizer's clips
    assert two_ranks["deep"]["counts"] == counts
    assert two_ranks["once"]["counts"] == counts
    assert two_ranks["deep"]["loss"] != two_ranks["shallow"]["loss"]


@pytest.mark.distributed
def test_resharding_gathers_again_in_each_backward_pass(two_ranks):
    counts, config = two_ranks["freed"]["counts"], config_of("run")
    again = config.micro_steps * (units(config) - 1)  # the root stays
    assert counts["gathers"] == units(config) + again
    assert counts["reduces"] == units(config)
    assert two_ranks["freed_deep"]["counts"] == counts
    assert_same_numbers(two_ranks["freed"], two_ranks["bfloat16"])
    assert_same_numbers(two_ranks["gated_freed"], two_ranks["gated"])


@pytest.mark.distributed
@pytest.mark.parametrize("recompute", ["step", "block"])
def test_recomputation_adds_no_communication_and_changes_no_numbers(two_ranks, recompute):
    assert two_ranks[recompute]["counts"] == two_ranks["shallow"]["counts"]
    assert_same_numbers(two_ranks[recompute], two_ranks["shallow"])


@pytest.mark.distributed
def test_replication_reduces_whole_gradients_and_gathers_nothing(two_ranks):
    counts = two_ranks["replicated"]["counts"]
    assert counts["gathers"] == 0
    assert counts["all_reduce_bytes"] == pytest.approx(4 * two_ranks["replicated"]["parameters"], rel=0.01)


@pytest.mark.distributed
def test_bfloat16_run_computes_in_bfloat16_and_reduces_in_float32(two_ranks):
    inside = {"state": "bfloat16", "weight": "bfloat16", "rotary": "float32"}
    kept = dict.fromkeys(("master", "gradient", "moment"), "float32")
    assert two_ranks["bfloat16"]["dtypes"] == {key: f"torch.{value}" for key, value in (inside | kept).items()}
    counts = two_ranks["bfloat16"]["counts"]
    assert counts["all_gather_bfloat16"] == counts["reduce_scatter_float32"] == units(config_of("run"))
    assert_same_numbers(two_ranks["bfloat16"], two_ranks["shallow"], tolerance=3e-2)


def in_one_process(out, **changes):
    trainer = Trainer(config_of(out, **changes), start_processes(CPU))
    trainer.train_step()
    trainer.step = 0
    seen = watch(trainer)
    record = trainer.train_step()
    return {"loss": record["loss"], "gradients": seen["gradients"]}


def assert_planned(results, world_size, name, **changes):
    """Compare measured and planned bytes; the few scalars of optimizer and trainer are not planned."""
    counts, planned = results[name]["counts"], communication(Job(config_of("run", **changes), world_size, 32))
    assert counts["all_gather_bytes"] == pytest.approx(planned["gather"], rel=0.01)
    assert counts["reduce_scatter_bytes"] == pytest.approx(planned["reduce_scatter"], rel=0.01)
    assert counts["all_reduce_bytes"] == pytest.approx(planned["all_reduce"], rel=0.02, abs=1000)


@pytest.mark.distributed
def test_plan_predicts_the_communicated_bytes(two_ranks):
    freed = dataclasses.replace(BFLOAT16, reshard_after_forward=True)
    assert_planned(two_ranks, 2, "shallow")
    assert_planned(two_ranks, 2, "bfloat16", runtime=BFLOAT16)
    assert_planned(two_ranks, 2, "freed", runtime=freed)
    assert_planned(two_ranks, 2, "replicated", runtime=dataclasses.replace(CPU, shard_size=1))
    assert_planned(two_ranks, 2, "every", objective=EVERY)
    assert_planned(two_ranks, 2, "every_freed", objective=EVERY, runtime=freed)
    assert_planned(two_ranks, 2, "gated", objective=GATED, runtime=BFLOAT16)
    assert_planned(two_ranks, 2, "gated_freed", objective=GATED, runtime=freed)


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["shallow", "replicated"])
def test_two_ranks_have_losses_and_gradients_of_one_process(two_ranks, tmp_path, how):
    assert_same_numbers(two_ranks[how], in_one_process(tmp_path))


def test_chunked_loss_changes_no_numbers(tmp_path):
    chunked = in_one_process(tmp_path, runtime=dataclasses.replace(CPU, loss_chunk_size=7))
    assert_same_numbers(chunked, in_one_process(tmp_path))


@pytest.mark.slow
@pytest.mark.distributed
def test_hybrid_sharding_on_four_ranks_equals_one_process(tmp_path):
    runs = {
        "hybrid": {"runtime": dataclasses.replace(CPU, shard_size=2)},
        "hybrid_deep": {"depth": 9, "runtime": dataclasses.replace(CPU, shard_size=2)},
        "sharded": {},
    }
    results = measure(tmp_path, 4, **runs)
    for name in ("hybrid", "sharded"):
        assert_same_numbers(results[name], in_one_process(tmp_path))
    counts = results["hybrid"]["counts"]
    assert results["hybrid_deep"]["counts"] == counts
    assert counts["gathers"] == counts["reduces"] == units(config_of("run"))
    # each half of the gradients is summed over the two replicas, in addition to a few scalars
    assert counts["all_reduce_bytes"] == pytest.approx(2 * results["hybrid"]["parameters"], rel=0.02)
    assert_planned(results, 4, "hybrid", runtime=dataclasses.replace(CPU, shard_size=2))
    assert_planned(results, 4, "sharded")
