"""Objectives against brute force in fp64: losses after every iteration, exit probabilities, labels of the gate."""

import dataclasses
import math
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from recurrent_depth.data.loader import open_source
from recurrent_depth.model.config import GateConfig
from recurrent_depth.model.gate import exit_log_probabilities
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.runs import checkpoints, load_run_model
from recurrent_depth.training.checkpoint import read_resume_details
from recurrent_depth.training.config import (
    CheckpointConfig,
    DistillationConfig,
    OptimizerConfig,
    RuntimeConfig,
    ValidationConfig,
)
from recurrent_depth.training.health import validate
from recurrent_depth.training.launch import train
from recurrent_depth.training.objective import gradient_steps, micro_step_flops, objective_of
from recurrent_depth.training.objective_config import (
    EveryConfig,
    GatedConfig,
    LabelledConfig,
    ObjectiveConfig,
    SelfDistilledConfig,
)
from recurrent_depth.training.trainer import Trainer
from support import ONE_RANK, assert_equal_runs, lively_model, losses, records, run_ranks, small_run

V, T, IGNORED = 50, 9, -100
OBJECTIVES = {
    "every": ObjectiveConfig(every=EveryConfig(reads=2)),
    "gated": ObjectiveConfig(gated=GatedConfig(beta=0.1)),
    "self_distilled": ObjectiveConfig(self_distilled=SelfDistilledConfig(decay_steps=8)),
    "labelled": ObjectiveConfig(labelled=LabelledConfig()),
}


@pytest.fixture(scope="module")
def model():
    model = lively_model(gate=GateConfig(input="state_and_change"))
    with torch.no_grad():
        model.transformer.gate.weight.normal_(generator=torch.Generator().manual_seed(5))
        model.transformer.gate.bias.fill_(-0.5)
    return model


def configured(model, objective):
    trainable = "gate" if objective.labelled else "all"
    return small_run("run", model=model.config, objective=objective, trainable=trainable)


def batch():
    """Return ids and targets of two rows of two packed documents, the first targets without a loss."""
    ids = torch.randint(V, (2, T + 1), generator=torch.Generator().manual_seed(1))
    targets = ids[:, 1:].clone()
    targets[0, :3] = IGNORED
    documents = torch.tensor([[0] * 5 + [1] * (T - 5)] * 2)
    positions = torch.tensor([[*range(5), *range(T - 5)]] * 2)
    return ids[:, :-1], targets, {"document_ids": documents, "position_ids": positions}


def loss_of(model, objective, depth, step=0, chunk=None):
    config, (ids, targets, packing) = configured(model, objective), batch()
    chosen = objective_of(config, step, 0)
    steps = gradient_steps(config, depth)
    return model(ids, num_steps=steps, targets=targets, objective=chosen, loss_chunk_size=chunk, **packing).loss


def by_depth(model, depth):
    """Return log-probabilities [R, B, T, V] and states [R + 1, B, T, D], from one forward pass for every depth."""
    ids, _, packing = batch()
    with torch.no_grad():
        passes = [model(ids, num_steps=r, **packing) for r in range(1, sum(depth) + 1)]
    states = [torch.zeros_like(passes[0].state), *(found.state for found in passes)]
    return torch.stack([found.logits.log_softmax(-1) for found in passes]), torch.stack(states)


@torch.no_grad()
def stop_probabilities(gate, states):
    """Return lambda [R, B, T], by the definition of the gate."""
    found = []
    for before, after in pairwise(states):
        size = after.pow(2).mean(-1, keepdim=True).sqrt()
        x = torch.cat([after / size, (after - before) / size], dim=-1)
        found.append(1 / (1 + torch.exp(-((x * gate.weight).sum(-1) + gate.bias))))
    return torch.stack(found)


def token_by_token(model, depth, one_token):
    """Return the sum of one_token(log-probabilities [K, V], lambda [K], target) over valid targets."""
    logp, states = by_depth(model, depth)
    stops, targets = stop_probabilities(model.transformer.gate, states), batch()[1]
    return sum(
        float(one_token(logp[depth[0] :, b, t], stops[depth[0] :, b, t], int(targets[b, t])))
        for b in range(2)
        for t in range(T)
        if targets[b, t] != IGNORED
    )


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("depth", [(0, 1), (0, 4), (2, 3)])
def test_expected_loss_equals_brute_force(model, depth, chunk):
    def one_token(logp, stops, target):
        expected = entropy = 0.0
        left = 1.0
        for t, row in enumerate(logp):
            p = left if t + 1 == len(logp) else left * float(stops[t])
            left -= p
            expected -= p * float(row[target])
            entropy -= p * math.log(p)
        return expected + 0.1 * (math.log(len(logp)) - entropy)

    found = loss_of(model, OBJECTIVES["gated"], depth, chunk=chunk)
    assert found.item() == pytest.approx(token_by_token(model, depth, one_token), rel=1e-10)


def test_validation_records_the_mean_iteration_of_exit(model, tmp_path):
    config = small_run(tmp_path, model=model.config, validation=ValidationConfig(rows=3, num_steps=(1,)))
    source = open_source(config.data, "validation", config.seed, config.steps)
    rows = source.batch(0, 3, 0)
    with torch.no_grad():
        states = [model(rows.input_ids, num_steps=r).state for r in range(1, model.config.mean_recurrence + 1)]
    stops = stop_probabilities(model.transformer.gate, [torch.zeros_like(states[0]), *states])
    total = count = 0.0
    for b, t in (rows.targets != IGNORED).nonzero().tolist():
        left, count = 1.0, count + 1
        for iteration, stop in enumerate(stops[:, b, t].tolist(), start=1):
            p = left if iteration == len(stops) else left * stop
            left, total = left - p, total + p * iteration
    found = validate(model, source, config.validation, 2, ONE_RANK)
    assert found["exit_num_steps"] == pytest.approx(total / count, rel=1e-10)


@pytest.mark.parametrize("chunk", [None, 4])
def test_every_reads_the_last_and_drawn_iterations_with_gradient(model, chunk):
    pairs = [
        token_by_token(model, (1, 4), lambda logp, stops, target, i=i: -(logp[i, target] + logp[-1, target]) / 2)
        for i in range(3)
    ]
    drawn = {round(loss_of(model, OBJECTIVES["every"], (1, 4), step, chunk).item(), 6) for step in range(12)}
    assert drawn == {round(pair, 6) for pair in pairs}
    everything = ObjectiveConfig(every=EveryConfig(reads=9))
    expected = token_by_token(model, (1, 4), lambda logp, stops, target: -logp[:, target].mean())
    assert loss_of(model, everything, (1, 4), chunk=chunk).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize(("step", "data_weight"), [(0, 1.0), (2, 0.75), (9, 0.0)])
def test_self_distilled_loss_equals_brute_force(model, step, data_weight, chunk):
    def one_token(logp, stops, target):
        taught = -(logp[-1].exp() * logp[0]).sum()
        return -logp[-1, target] - data_weight * logp[0, target] + (1 - data_weight) * taught

    found = loss_of(model, OBJECTIVES["self_distilled"], (3, 2), step, chunk)
    assert found.item() == pytest.approx(token_by_token(model, (3, 2), one_token), rel=1e-10)


def test_teacher_of_self_distillation_has_no_gradient(model):
    """With w = 0 the gradient is that of the last loss and of the divergence from a constant distribution."""
    ids, targets, packing = batch()
    weight, valid = model.transformer.adapter.weight, targets != IGNORED
    (found,) = torch.autograd.grad(loss_of(model, OBJECTIVES["self_distilled"], (0, 2), step=9), weight)
    last, first = (model(ids, num_steps=r, **packing).logits.log_softmax(-1) for r in (2, 1))
    hard = -last.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    taught = -(last.detach().exp() * first).sum(-1)
    (expected,) = torch.autograd.grad((hard + taught)[valid].sum(), weight)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_in_chunks_has_the_gradients_of_the_whole(model, name):
    part = model.transformer.gate if name == "labelled" else model.transformer.core_block
    whole, chunked = (
        torch.autograd.grad(loss_of(model, OBJECTIVES[name], (2, 3), chunk=chunk), list(part.parameters()))
        for chunk in (None, 4)
    )
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_exit_probabilities_sum_to_one_and_survive_saturated_gates():
    logits = torch.tensor([[0.3, -900, 900], [-1, -900, 900], [0.5, 900, -900]], dtype=torch.float64)
    p = exit_log_probabilities(logits).exp()
    torch.testing.assert_close(p.sum(0), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(p[:, 1:], torch.tensor([[0.0, 1], [0, 0], [1, 0]], dtype=torch.float64))
    assert exit_log_probabilities(logits[:1]).tolist() == [[0, 0, 0]]


def test_gradient_of_the_entropy_term_equals_finite_differences(model):
    gate = model.transformer.gate

    def term():
        full, expected = (
            loss_of(model, ObjectiveConfig(gated=GatedConfig(beta=beta)), (1, 3)) for beta in (1.0, 0.0)
        )  # fmt: skip
        return full - expected

    found = torch.autograd.grad(term(), [gate.weight, gate.bias])
    for tensor, gradient, place in ((gate.weight, found[0], 3), (gate.weight, found[0], 40), (gate.bias, found[1], 0)):
        with torch.no_grad():
            start = tensor[place].item()
            tensor[place] = start + 1e-5
            above = term().item()
            tensor[place] = start - 1e-5
            below = term().item()
            tensor[place] = start
        assert gradient[place].item() == pytest.approx((above - below) / 2e-5, rel=1e-5)


def backward(losses, t):
    improvement = max(0.0, losses[t - 1] - losses[t])
    return None if t == 0 else 1 - 1 / (1 + math.exp(-50 * (improvement - 0.02)))


def forward(losses, t):
    return None if t + 1 == len(losses) else float(min(losses[t + 1 :]) >= losses[t] - 0.02)


@pytest.mark.parametrize("label", ["backward", "forward", "accuracy"])
@pytest.mark.parametrize("depth", [(0, 1), (3, 2)])
def test_label_loss_equals_brute_force_over_all_iterations(model, label, depth):
    def one_token(logp, stops, target):
        found, terms = [-float(row[target]) for row in logp], []
        for t, stop in enumerate(stops.tolist()):
            right = float(int(logp[t].argmax()) == target)
            wanted = {"backward": backward(found, t), "forward": forward(found, t), "accuracy": right}[label]
            if wanted is not None:
                terms.append(-(wanted * math.log(stop) + (1 - wanted) * math.log(1 - stop)))
        return sum(terms) / max(len(terms), 1)

    found = loss_of(
        model, ObjectiveConfig(labelled=LabelledConfig(label, margin=None if label == "accuracy" else 0.02)), depth
    )
    assert found.item() == pytest.approx(token_by_token(model, (0, sum(depth)), one_token), rel=1e-10, abs=1e-12)
    assert torch.autograd.grad(found, model.transformer.gate.weight)[0].isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("depth", [(0, 1), (2, 3)])
@pytest.mark.parametrize("chunk", [None, 4])
def test_flops_of_an_objective_equal_the_torch_counter(name, depth, chunk):
    model = RecurrentDepthModel(dataclasses.replace(small_run("o").model, gate=GateConfig()))
    model.initialise(0)
    config = dataclasses.replace(
        configured(model, OBJECTIVES[name]), runtime=RuntimeConfig(loss_chunk_size=chunk)
    )  # fmt: skip
    if name == "labelled":
        model.requires_grad_(False).transformer.gate.requires_grad_(True)
    ids, targets, packing = batch()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(
            ids, targets=targets, num_steps=gradient_steps(config, depth),
            input_states=torch.randn(2, T, model.config.n_embd), objective=objective_of(config, 0, 0),
            loss_chunk_size=chunk, **packing,
        ).loss.backward()  # fmt: skip
    assert counter.get_total_flops() == 2 * micro_step_flops(config, T, depth, executed=True, causal=False)


def gated_run(out, name, **changes):
    defaults = {
        "model": dataclasses.replace(small_run(out).model, gate=GateConfig(input="state_and_change", bias=-1)),
        "objective": OBJECTIVES[name],
        "trainable": "gate" if name == "labelled" else "all",
        "validation": ValidationConfig(every=12, rows=8, num_steps=(1,)),
    }
    return small_run(out, **(defaults | changes))


@pytest.mark.parametrize("name", ["gated", "labelled"])
def test_resumed_gate_training_is_bitwise_the_uninterrupted_one(tmp_path, name):
    config = gated_run(tmp_path / "whole", name, steps=4, checkpoint=CheckpointConfig(every=2))
    train(config)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000004")
    train(dataclasses.replace(config, out=str(tmp_path / "parts")), resume=True)
    assert_equal_runs(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("optimizer", ["huginn", "muon"])
def test_training_the_gate_of_a_model_changes_nothing_else(tmp_path, optimizer):
    plain = small_run(tmp_path / "plain", steps=2)
    train(plain)
    chosen = OptimizerConfig(name=optimizer, lr=2e-2, warmup_steps=1)
    mostly_wrong = ObjectiveConfig(labelled=LabelledConfig("accuracy"))
    config = gated_run(
        tmp_path / "gate", "labelled", objective=mostly_wrong, init_from=plain.out, optimizer=chosen
    )  # fmt: skip
    train(config)
    before, after = (dict(load_run_model(run).named_parameters()) for run in (plain.out, config.out))
    assert after.keys() - before.keys() == {"transformer.gate.weight", "transformer.gate.bias"}
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert (after["transformer.gate.weight"] != 0).all()
    found = losses(tmp_path / "gate")
    assert sum(found[-3:]) < sum(found[:3])
    with pytest.raises(RuntimeError, match=r"has an exit gate, which this run would drop; set --model.gate.input"):
        train(small_run(tmp_path / "dropped", init_from=config.out))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_on_two_ranks_equals_one_and_resumes_on_another_number(tmp_path, name):
    runtime = RuntimeConfig(device="cpu", threads=1, loss_chunk_size=20, activation_checkpointing="step")
    config = gated_run(tmp_path / "one", name, steps=4, runtime=runtime, checkpoint=CheckpointConfig(every=2))
    train(config)
    many = dataclasses.replace(config, out=str(tmp_path / "many"))
    assert run_ranks(train, 2, many) == [0, 0]
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = (records(tmp_path / name, "validation")[-1]["exit_num_steps"] for name in ("one", "many"))
    assert 1 < two == pytest.approx(one, rel=1e-4)
    expected = whole_state(config)
    for run in ("many", "one"):  # from two ranks to one, and from one to two
        shutil.rmtree(tmp_path / run / "checkpoints" / "step-00000004")
        resumed = dataclasses.replace(config, out=str(tmp_path / run))
        if run == "many":
            resume(resumed)
        else:
            assert run_ranks(resume, 2, resumed) == [0, 0]
        torch.testing.assert_close(whole_state(resumed), expected, rtol=1e-3, atol=1e-5)


def resume(config):
    train(config, resume=True)


def whole_state(config):
    """Return the weights of the newest checkpoint of a run, and the moments of the gate."""
    trainer, checkpoint = Trainer(config, ONE_RANK), checkpoints(Path(config.out))[-1]
    trainer.resume(checkpoint, read_resume_details(checkpoint))
    moments = {
        f"{name} {key}": value
        for name, p in trainer.model.named_parameters()
        if name.startswith("transformer.gate") and p.requires_grad
        for key, value in trainer.optimizer.state[p].items()
    }
    return {name: p.detach() for name, p in load_run_model(config.out).named_parameters()} | moments


def test_gate_that_no_objective_trains_changes_nothing(tmp_path):
    """`last` with a gate in the model has the losses and weights of a model without one, bit by bit."""
    plain, gated = small_run(tmp_path / "plain", steps=4), gated_run(tmp_path / "gated", "every", steps=4)
    gated = dataclasses.replace(gated, objective=ObjectiveConfig(), validation=plain.validation)
    train(plain)
    train(gated)
    assert losses(tmp_path / "gated") == losses(tmp_path / "plain")
    before, after = (dict(load_run_model(run.out).named_parameters()) for run in (plain, gated))
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_objective_that_cannot_work_is_refused():
    gate = dataclasses.replace(small_run("o").model, gate=GateConfig())
    every, teacher = {"objective": OBJECTIVES["every"]}, {"distillation": DistillationConfig("t")}
    for text, changes in {
        "objective.gated trains the exit gate, but model.gate is null": {"objective": OBJECTIVES["gated"]},
        "trainable is gate, but the objective every": {"trainable": "gate", "model": gate, **every},
        "trainable is all, but objective.labelled": {"objective": OBJECTIVES["labelled"], "model": gate},
        "distillation and objective.every": every | teacher,
    }.items():
        with pytest.raises(ValueError, match=text):
            small_run("o", **changes)
    with pytest.raises(ValueError, match=r"margin is 0.1, but the label accuracy does not compare losses"):
        LabelledConfig("accuracy", margin=0.1)
    with pytest.raises(ValueError, match="every and gated are given; give at most one of"):
        ObjectiveConfig(every=EveryConfig(), gated=GatedConfig())
