"""The cache against the reference vectors, and its budget against brute force."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recurrent_depth.generation.cache import RecurrentCache, cache_bytes
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


def decode(model, ids, cache, first, num_steps):
    with torch.no_grad():
        pieces = [model(ids[:, :first], num_steps=num_steps, cache=cache).logits]
        for t in range(first, ids.shape[1]):
            pieces.append(model(ids[:, t : t + 1], num_steps=num_steps, cache=cache).logits)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("r", [1, 2, 5])
def test_cached_logits_equal_the_released_implementation(model, r):
    expected = load_file(FIXTURE / "expected.safetensors")
    ids = expected["input_ids"]
    logits = decode(model, ids, RecurrentCache(model.config, 2, 16, num_steps=r), 12, r)
    torch.testing.assert_close(logits, expected[f"cached_logits_s{r}"], rtol=1e-5, atol=1e-5)


def test_decoding_with_a_full_cache_equals_one_parallel_pass(model):
    model = model.double()
    ids = torch.randint(0, 160, (3, 14))
    cache = RecurrentCache(model.config, 3, 14, num_steps=4, dtype=torch.float64)
    whole = model(ids, num_steps=4).logits
    torch.testing.assert_close(decode(model, ids, cache, 1, 4), whole, rtol=1e-10, atol=1e-10)
    cache.crop(5)
    with torch.no_grad():
        again = model(ids[:, 5:9], num_steps=4, cache=cache).logits
    torch.testing.assert_close(again, whole[:, 5:9], rtol=1e-10, atol=1e-10)
    model.float()


@pytest.mark.parametrize(("budget", "steps"), [(1, 3), (2, 5), (3, 4)])
def test_a_budget_leaves_the_latest_entry_of_each_recurrence(budget, steps):
    config = ModelConfig(n_layers_in_recurrent_block=2)
    cache = RecurrentCache(config, 1, 3, num_steps=steps, budget=budget)
    for token in range(3):
        for slot in range(2 + 2 * steps):
            mark = torch.full((1, config.n_heads, 1, config.head_dim), float(100 * token + slot))
            keys, _ = cache.update(mark, mark, slot)
            for earlier in range(token):
                if slot < 2:
                    seen = slot
                else:  # the last step that wrote to the same place
                    step, layer = divmod(slot - 2, 2)
                    seen = 2 + 2 * max(s for s in range(steps) if s % budget == step % budget) + layer
                assert keys[0, 0, earlier, 0].item() == 100 * earlier + seen
        cache.advance(1)
    assert cache.num_bytes == (2 + 2 * budget) * 2 * config.n_embd * 3 * 4


def test_a_full_cache_says_so(model):
    cache = RecurrentCache(model.config, 1, 4, num_steps=2)
    with pytest.raises(ValueError, match="max_length"):
        model(torch.zeros(1, 5, dtype=torch.int64), num_steps=2, cache=cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [None, 1, 3, 9])
def test_bytes_are_known_beforehand(budget, dtype):
    config = ModelConfig(n_layers_in_recurrent_block=2)
    shape = {"batch_size": 3, "max_length": 7, "num_steps": 5, "budget": budget, "dtype": dtype}
    assert cache_bytes(config, **shape) == RecurrentCache(config, **shape).num_bytes
    kept = min(budget or 5, 5)
    assert cache_bytes(config, **shape) == (2 + 2 * kept) * 2 * 3 * 7 * config.n_embd * dtype.itemsize


def test_rows_are_reordered_as_beams_are(model):
    model = model.double()
    ids = torch.randint(0, 160, (3, 9), generator=torch.Generator().manual_seed(0))
    cache = RecurrentCache(model.config, 3, 9, num_steps=3, dtype=torch.float64)
    beams = torch.tensor([2, 0, 2])
    with torch.no_grad():
        model(ids[:, :6], num_steps=3, cache=cache)
        cache.reorder(beams)
        reordered = torch.cat([ids[beams, :6], ids[:, 6:]], dim=1)
        logits = model(ids[:, 6:], num_steps=3, cache=cache).logits
    whole = model(reordered, num_steps=3).logits
    torch.testing.assert_close(logits, whole[:, 6:], rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="a source for each of 3 rows"):
        cache.reorder(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="cannot crop a cache of 9 tokens to 10"):
        cache.crop(10)
    model.float()
