"""The model against tests/fixtures/huginn_tiny, computed with the released implementation in fp32 on a CPU."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recurrent_depth.model.config import SHAPES, ModelConfig
from recurrent_depth.model.transformer import RecurrentDepthModel

FIXTURE = Path(__file__).parents[1] / "fixtures" / "huginn_tiny"


@pytest.fixture(scope="module")
def expected():
    return load_file(FIXTURE / "expected.safetensors")


@pytest.fixture
def model():
    raw = json.loads((FIXTURE / "config.json").read_text())
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    config = ModelConfig(**{key: value for key, value in raw.items() if key in fields - {"state_init"}})
    model = RecurrentDepthModel(config)
    missing, unexpected = model.load_state_dict(load_file(FIXTURE / "model.safetensors"), strict=False)
    assert missing == ["lm_head.weight"]  # tied, not stored
    assert not unexpected
    return model


def close(actual, reference):
    torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-5 * reference.abs().max().item())


@pytest.mark.parametrize("r", [1, 2, 5])
def test_logits_and_states_equal_the_reference(model, expected, r):
    ids = expected["input_ids"]
    out = model(ids, num_steps=r, input_states=expected["input_states"], return_states=True)
    close(out.logits, expected[f"logits_s{r}"])
    close(model.transformer.ln_f(out.state), expected[f"states_s{r}"])
    assert len(out.states) == r
    assert torch.equal(out.states[-1], out.state)
    close(model(ids, num_steps=r).logits, expected[f"zero_state_logits_s{r}"])


@pytest.mark.parametrize(("n", "k"), [(0, 3), (2, 2)])
def test_loss_and_gradients_equal_the_reference(model, expected, n, k):
    ids = expected["input_ids"]
    out = model(ids, num_steps=(n, k), input_states=expected["input_states"], labels=ids)
    close(out.loss, expected[f"loss_n{n}_k{k}"])
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    prefix = f"grad_n{n}_k{k}."
    names = [key.removeprefix(prefix) for key in expected if key.startswith(prefix)]
    assert len(names) >= 7
    for name in names:
        close(gradients[name], expected[prefix + name])


def test_integer_num_steps_carries_gradient_through_all_iterations(model, expected):
    ids = expected["input_ids"]
    full = model(ids, num_steps=3, input_states=expected["input_states"], labels=ids)
    full.loss.backward()
    close(model.transformer.adapter.weight.grad, expected["grad_n0_k3.transformer.adapter.weight"])


def test_huginn_has_the_published_parameter_count():
    with torch.device("meta"):
        model = RecurrentDepthModel(SHAPES["huginn-3.5b"])
    assert model.num_parameters == 3_564_976_800
    assert sum(p.numel() for p in model.transformer.core_block.parameters()) == 1_581_592_320
    assert model.transformer.adapter.weight.numel() == 55_756_800
