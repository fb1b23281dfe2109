"""Distillation from a teacher, and training of the adapter alone."""

import dataclasses

import pytest
import torch

from recurrent_depth.data.batch import Batch
from recurrent_depth.hf.loading import wrap
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.runs import load_run_model
from recurrent_depth.training.config import DistillationConfig, OptimizerConfig
from recurrent_depth.training.distillation import Teacher
from recurrent_depth.training.launch import train
from support import losses, run_ranks, small_run

SHAPE = ModelConfig(
    n_embd=32, n_heads=2, intermediate_size=64, vocab_size=64, block_size=32, mean_recurrence=4, mean_backprop_depth=2
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Return the folder of a random recurrent model."""
    model = RecurrentDepthModel(SHAPE)
    model.initialise(seed=7)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    folder = tmp_path_factory.mktemp("teacher")
    wrap(model).save_pretrained(folder)
    return folder


def batch_of(T=12, documents=None):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(64, (2, T + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[0, :5] = -100
    positions = None if documents is None else torch.tensor([list(range(documents)) + list(range(T - documents))] * 2)
    return Batch(ids[:, :-1], targets, position_ids=positions)


def brute_force(logits, teacher_logits, targets, weight, T):
    """Return the loss token by token in fp64."""
    total = 0.0
    for b, row in enumerate(targets.tolist()):
        for t, target in enumerate(row):
            if target == -100:
                continue
            student, model = logits[b, t].double(), teacher_logits[b, t].double()
            hard = -student.log_softmax(-1)[target]
            p, q = (model / T).softmax(-1), (student / T).softmax(-1)
            total += (1 - weight) * hard.item() + weight * T**2 * (p * (p / q).log()).sum().item()
    return total


@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 2.0), (1.0, 1.0), (0.0, 3.0)])
def test_distillation_loss_equals_brute_force(teacher, weight, temperature):
    batch = batch_of()
    source = Teacher(DistillationConfig(str(teacher), weight, temperature), 64, CPU, torch.float32)
    logits = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = brute_force(logits, source.model(batch.input_ids).logits, batch.targets, weight, temperature)
    assert source.loss(logits, batch).item() == pytest.approx(expected, rel=1e-5)


def test_teacher_of_the_same_weights_has_no_divergence(teacher):
    batch = batch_of()
    source = Teacher(DistillationConfig(str(teacher), 1.0, 2.0), 64, CPU, torch.float32)
    assert source.loss(source.model(batch.input_ids).logits, batch).item() == pytest.approx(0, abs=1e-4)


def test_teacher_sees_only_the_document_of_a_token(teacher):
    source = Teacher(DistillationConfig(str(teacher), 1.0, 1.0), 64, CPU, torch.float32)
    batch = batch_of(documents=7)
    alone = torch.cat([source.model(part).logits for part in batch.input_ids.split([7, 5], dim=1)], dim=1)
    assert source.loss(alone, batch).item() == pytest.approx(0, abs=1e-4)


def test_teacher_with_another_vocabulary_is_refused(teacher):
    with pytest.raises(ValueError, match=r"predicts 64 tokens, but model.vocab_size is 80; teacher and student"):
        Teacher(DistillationConfig(str(teacher)), 80, CPU, torch.float32)


@pytest.mark.slow
def test_distilled_run_approaches_its_teacher(tmp_path, teacher):
    run = small_run(
        tmp_path / "run", model=SHAPE, steps=40, distillation=DistillationConfig(str(teacher), 1.0, 1.0),
        optimizer=OptimizerConfig(name="adamw", lr=3e-3, warmup_steps=3),
    )  # fmt: skip
    found = losses(train(run))
    assert sum(found[-5:]) < 0.8 * sum(found[:5])


@pytest.mark.slow
@pytest.mark.distributed
def test_distillation_on_two_ranks_equals_one(tmp_path, teacher):
    config = small_run(tmp_path / "one", model=SHAPE, distillation=DistillationConfig(str(teacher)))
    train(config)
    many = dataclasses.replace(config, out=str(tmp_path / "many"))
    assert run_ranks(train, 2, many) == [0, 0]
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("optimizer", ["huginn", "muon"])
def test_adapter_only_training_changes_the_adapter_alone(tmp_path, optimizer):
    config = small_run(
        tmp_path / "one", trainable="adapter", optimizer=OptimizerConfig(name=optimizer, lr=2e-3, warmup_steps=3)
    )
    train(config)
    start = RecurrentDepthModel(config.model)
    start.initialise(config.seed)
    before, after = dict(start.named_parameters()), dict(load_run_model(config.out).named_parameters())
    assert [name for name in before if not before[name].equal(after[name])] == ["transformer.adapter.weight"]
    many = dataclasses.replace(config, out=str(tmp_path / "many"))
    assert run_ranks(train, 2, many) == [0, 0]
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
