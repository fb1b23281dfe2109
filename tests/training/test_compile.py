"""Compiled blocks, sharded and recomputed: few graphs, no new ones at another depth, and the same losses as eager."""

import functools

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

from recurrent_depth.model.config import GateConfig, ModelConfig
from recurrent_depth.training.config import RuntimeConfig
from recurrent_depth.training.objective import objective_of
from recurrent_depth.training.objective_config import (
    EveryConfig,
    GatedConfig,
    LabelledConfig,
    ObjectiveConfig,
    SelfDistilledConfig,
)
from recurrent_depth.training.parallel import build_model
from support import ONE_RANK, run_ranks, small_run

CONFIG = ModelConfig(
    n_embd=32, n_heads=2, intermediate_size=48, n_layers_in_prelude=2, n_layers_in_recurrent_block=3,
    n_layers_in_coda=2, vocab_size=50, gate=GateConfig(),
)  # fmt: skip
OBJECTIVES = {
    "last": ObjectiveConfig(),
    "every": ObjectiveConfig(every=EveryConfig(reads=3)),
    "gated": ObjectiveConfig(gated=GatedConfig(beta=0.1)),
    "self_distilled": ObjectiveConfig(self_distilled=SelfDistilledConfig()),
    "labelled": ObjectiveConfig(labelled=LabelledConfig("forward")),
}
DEPTHS = [(0, 1), (3, 2), (1, 4), (6, 1), (0, 5)]


def losses_at_depths(dtype, recompute, name, compiled):
    trainable = "gate" if name == "labelled" else "all"
    objective = objective_of(small_run("run", model=CONFIG, objective=OBJECTIVES[name], trainable=trainable), 0, 0)
    runtime = RuntimeConfig(device="cpu", dtype=dtype, activation_checkpointing=recompute, compile=compiled)
    model = build_model(CONFIG, runtime, ONE_RANK, seed=0)
    ids = torch.arange(18).reshape(2, 9)
    values = []
    for depth in DEPTHS:
        loss = model(ids, targets=ids, num_steps=depth, objective=objective).loss
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        values += [loss.item(), float(norm)]
        model.zero_grad()
    return torch.tensor(values)


def compare(dtype, recompute, name):
    counter = CompileCounterWithBackend("aot_eager")
    torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend=counter)
    compiled = losses_at_depths(dtype, recompute, name, True)
    # Blocks of one kind share their graphs: with and without gradient, and FSDP units apart from the core's blocks.
    assert 2 <= counter.frame_count <= 4, counter.frame_count
    torch.testing.assert_close(compiled, losses_at_depths(dtype, recompute, name, False), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "recompute"),
    [
        ("last", "float32", "none"), ("last", "bfloat16", "step"), ("gated", "float32", "block"),
        ("gated", "bfloat16", "step"), ("every", "float32", "step"), ("self_distilled", "float32", "none"),
        ("labelled", "float32", "none"),
    ],
)  # fmt: skip
def test_compiled_blocks_are_not_recompiled_for_another_depth(name, dtype, recompute):
    assert run_ranks(compare, 1, dtype, recompute, name) == [0]
