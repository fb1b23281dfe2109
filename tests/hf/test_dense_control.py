"""The dense control trains on the same rows with the same schedule."""

import json
import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reasoning_rows import puzzles, write_rows
from recurrent_depth.data.config import DataConfig, PackedDataConfig
from recurrent_depth.data.loader import open_source
from recurrent_depth.files import output_folder
from recurrent_depth.hf.dense_control import as_features, load_dense, optimizer_of, train_dense
from recurrent_depth.hf.loading import fast_tokenizer
from recurrent_depth.reasoning.config import ReasoningDataConfig
from recurrent_depth.reasoning.dataset import prepare_reasoning
from recurrent_depth.training.commands import DenseConfig
from recurrent_depth.training.config import OptimizerConfig, RunConfig, RuntimeConfig
from recurrent_depth.training.optimizer import learning_rate
from support import outcome, run_ranks


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    config = ReasoningDataConfig(out=str(folder / "data"), block=90, **write_rows(folder / "in", puzzles(60)))
    prepare_reasoning(config)
    shape = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(folder / "llama")
    fast_tokenizer(folder / "data" / "tokenizer.json").save_pretrained(folder / "llama")
    return folder


def data(folder):
    return PackedDataConfig(str(folder / "data"), document_masking=True, restart_positions=True)


def test_dense_model_gets_labels_and_separates_packed_examples(prepared):
    model = load_dense(str(prepared / "llama")).double().eval()
    for p in model.parameters():
        p.data.mul_(3.0)  # large weights, so that a leak between examples changes the loss
    batch = open_source(DataConfig(packed=data(prepared)), "train", 0, 1).batch(0, 1, 0)
    features = {name: value[None] for name, value in as_features(batch).items()}
    with torch.no_grad():
        count = (batch.targets != -100).sum().item()
        together = model(**features).loss.item() * count
        alone = 0.0
        for document in batch.document_ids[0].unique():
            own = batch.document_ids[0] == document
            ids, targets = batch.input_ids[0][own], batch.targets[0][own]
            logits = model(ids[None]).logits[0]
            alone += torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
        leaking = model(features["input_ids"], labels=features["labels"]).loss.item() * count
    assert together == pytest.approx(alone, rel=1e-6)  # transformers computes the loss in fp32
    assert abs(leaking - alone) > 1e-3 * alone


def test_dense_schedule_equals_the_recurrent_recipe():
    config = OptimizerConfig(name="adamw", lr=0.1, warmup_steps=3, cooldown_steps=4)
    optimizer, schedule = optimizer_of(torch.nn.Linear(2, 2), config, 10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([learning_rate(config, step, 10) for step in range(10)])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [config.weight_decay, 0.0]


def command(folder, out, model="llama", **changes):
    options = {
        "data": DataConfig(packed=data(folder)), "steps": 12, "batch_size": 4, "micro_steps": 2, "log_every": 1,
        "optimizer": OptimizerConfig(name="adamw", lr=3e-3, warmup_steps=2, cooldown_steps=2),
        "runtime": RuntimeConfig(device="cpu"),
    }  # fmt: skip
    run = RunConfig(out="unused", **(options | changes))
    return DenseConfig(run=run, model=str(folder / model), out=str(out))


@pytest.mark.slow
def test_dense_training_lowers_the_loss(prepared, tmp_path):
    folder = train_dense(command(prepared, tmp_path / "run"))
    (state,) = (tmp_path / "run").glob("checkpoint-12/trainer_state.json")
    values = [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    assert len(values) == 12
    assert sum(values[-3:]) < 0.9 * sum(values[:3])
    assert LlamaForCausalLM.from_pretrained(folder).config.vocab_size == 128
    with pytest.raises(FileExistsError, match="resume"):
        train_dense(command(prepared, tmp_path / "run"))


def test_dense_training_refuses_another_tokenizer_and_huginn_adam(prepared, tmp_path):
    small = LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(small).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="its own tokenizer"):
        train_dense(command(prepared, tmp_path / "a", model=tmp_path / "small"))
    with pytest.raises(ValueError, match="adamw"):
        train_dense(command(prepared, tmp_path / "b", optimizer=OptimizerConfig()))


def losses(run):
    (state,) = run.glob("checkpoint-*/trainer_state.json")
    return [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


@pytest.mark.slow
@pytest.mark.distributed
def test_dense_training_on_two_ranks_equals_one_process(prepared, tmp_path):
    """The rows of a training step are divided among the ranks; losses and weights equal those of one process."""
    one, two = command(prepared, tmp_path / "one", steps=4), command(prepared, tmp_path / "two", steps=4)
    assert run_ranks(train_dense, 1, one) == [0]
    assert run_ranks(train_dense, 2, two) == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    expected = LlamaForCausalLM.from_pretrained(tmp_path / "one" / "model").state_dict()
    for name, value in LlamaForCausalLM.from_pretrained(tmp_path / "two" / "model").state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def train_in_use(config, folder) -> None:
    outcome(folder, train_dense, config)


@pytest.mark.slow
@pytest.mark.distributed
def test_dense_training_refuses_a_folder_in_use_on_every_rank(prepared, tmp_path):
    with output_folder(tmp_path / "run"):
        codes = run_ranks(train_in_use, 2, command(prepared, tmp_path / "run"), tmp_path)
    assert 0 not in codes
    for rank in (0, 1):
        assert f"in use by process {os.getpid()}" in (tmp_path / f"outcome-{rank}.txt").read_text()


def test_dense_training_refuses_rows_that_do_not_divide_among_ranks(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="do not divide among 3 ranks"):
        train_dense(command(prepared, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
