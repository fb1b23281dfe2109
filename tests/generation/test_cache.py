"""The cache against the reference vectors and against parallel passes, and its size."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recurrent_depth.generation.cache import RecurrentCache, cache_bytes
from recurrent_depth.generation.engine import Decoder
from recurrent_depth.generation.tokens import Tokens
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.transformer import RecurrentDepthModel

FIXTURE = Path(__file__).parents[1] / "fixtures" / "huginn_tiny"


@pytest.fixture(scope="module")
def model():
    raw = json.loads((FIXTURE / "config.json").read_text())
    names = {field.name for field in dataclasses.fields(ModelConfig)} - {"state_init"}
    model = RecurrentDepthModel(ModelConfig(**{name: raw[name] for name in names & set(raw)}))
    model.load_state_dict(load_file(FIXTURE / "model.safetensors"), strict=False)
    return model.eval()


def tokens_of(model, rows, length, num_steps):
    return Tokens(model, RecurrentCache(model.config, rows, length, num_steps, dtype=model.lm_head.weight.dtype))


@pytest.mark.parametrize("r", [1, 2, 5])
def test_cached_logits_equal_the_reference(model, r):
    expected = load_file(FIXTURE / "expected.safetensors")
    ids, tokens = expected["input_ids"], tokens_of(model, 2, 16, r)
    with torch.no_grad():
        pieces = [tokens.feed(ids[:, :12], 0, r), *(tokens.feed(ids[:, t : t + 1], t, r) for t in range(12, 16))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected[f"cached_logits_s{r}"], rtol=1e-5, atol=1e-5)


def test_decoding_with_a_full_cache_equals_one_parallel_pass(model):
    model = model.double()
    ids = torch.randint(0, 160, (3, 14))
    whole = model(ids, num_steps=4).logits
    torch.testing.assert_close(Decoder(model).logits(ids, 4), whole, rtol=1e-10, atol=1e-10)
    model.float()


def test_cache_columns_can_be_overwritten(model):
    """As after a rejected draft: the old entries of later columns are not read."""
    model = model.double()
    ids, wrong = torch.randint(0, 160, (2, 3, 14), generator=torch.Generator().manual_seed(0))
    tokens = tokens_of(model, 3, 14, 4)
    with torch.no_grad():
        tokens.feed(ids[:, :5], 0, 4)
        tokens.feed(wrong[:, 5:], 5, 4)
        again = tokens.feed(ids[:, 5:9], 5, 4)
    torch.testing.assert_close(again, model(ids, num_steps=4).logits[:, 5:9], rtol=1e-10, atol=1e-10)
    model.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [None, 1, 3, 9])
def test_cache_bytes_equals_the_allocated_size(budget, dtype):
    config = ModelConfig(n_layers_in_recurrent_block=2)
    shape = {"batch_size": 3, "max_length": 7, "num_steps": 5, "budget": budget, "dtype": dtype}
    assert cache_bytes(config, **shape) == RecurrentCache(config, **shape).num_bytes
    kept = min(budget or 5, 5)
    assert cache_bytes(config, **shape) == (2 + 2 * kept) * 2 * 3 * 7 * config.n_embd * dtype.itemsize
