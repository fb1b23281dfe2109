"""Training from the weights of a run or a Hugging Face folder (init_from)."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recurrent_depth.data.config import DataConfig, TaskDataConfig
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.runs import CheckpointError, load_run_model
from recurrent_depth.training.launch import load_weights, train
from recurrent_depth.training.parallel import build_model
from support import ONE_RANK, small_run

FIXTURE = Path(__file__).parents[1] / "fixtures" / "huginn_tiny"


def test_init_from_a_run_starts_with_its_weights(tmp_path):
    train(small_run(tmp_path / "first"))
    still = small_run(tmp_path / "second", init_from=str(tmp_path / "first"), steps=1)
    still = dataclasses.replace(still, optimizer=dataclasses.replace(still.optimizer, lr=1e-12, weight_decay=0.0))
    train(still)
    first, second = (load_run_model(tmp_path / name).state_dict() for name in ("first", "second"))
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-6, atol=1e-7)


def test_init_from_a_huginn_folder_starts_with_its_weights(tmp_path):
    raw = json.loads((FIXTURE / "config.json").read_text())
    names = {field.name for field in dataclasses.fields(ModelConfig)} - {"state_init"}
    config = ModelConfig(**{name: raw[name] for name in names & set(raw)})
    run = small_run(
        tmp_path / "run", model=config, data=DataConfig(task=TaskDataConfig(name="shell_game", max_length=8))
    )
    model = build_model(config, run.runtime, ONE_RANK, seed=0)
    load_weights(model, str(FIXTURE))
    stored = load_file(FIXTURE / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, stored[name.replace("lm_head", "transformer.wte")]), name


def test_init_from_another_shape_is_refused(tmp_path):
    train(small_run(tmp_path / "first", steps=2))
    config = small_run(tmp_path / "second", init_from=str(tmp_path / "first"))
    with pytest.raises(CheckpointError, match=r"transformer.*needs"):
        train(dataclasses.replace(config, model=dataclasses.replace(config.model, n_embd=48)))


@pytest.mark.parametrize(
    ("field", "value"), [("rope_base", 10_000.0), ("n_layers_in_prelude", 1), ("norm", "layer"), ("norm_eps", 1e-4)]
)
def test_init_from_a_model_that_computes_something_else_is_refused(tmp_path, field, value):
    first = small_run(tmp_path / "first", steps=1)
    first = dataclasses.replace(first, model=dataclasses.replace(first.model, n_layers_in_prelude=2))
    train(first)
    second = small_run(tmp_path / "second", init_from=str(tmp_path / "first"))
    with pytest.raises(CheckpointError, match=rf"{field} is .* there and {value} here"):
        train(dataclasses.replace(second, model=dataclasses.replace(first.model, **{field: value})))


def test_init_from_names_a_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in [name for name in sys.modules if name.startswith("recurrent_depth.hf")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=r"needs the package transformers: pip install 'recurrent-depth\[hf\]'"):
        train(small_run(tmp_path / "run", init_from=str(FIXTURE)))
