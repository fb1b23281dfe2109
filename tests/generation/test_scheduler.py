"""Depth-refilled batching writes what one request at a time writes, at the same depths; fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recurrent_depth.generation.decoding import Decoding, decode
from recurrent_depth.generation.exits import OutputKL, StableArgmax, StateChange
from recurrent_depth.generation.scheduler import Refill, decode_refilled
from support import lively_model


@pytest.fixture(scope="module")
def model():
    return lively_model(block_size=64)


def random_prompts(lengths, seed, vocab_size=50):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_tokens_and_depths_equal_one_at_a_time(model, data):
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=6), "lengths")
    prompts = random_prompts(lengths, data.draw(st.integers(0, 99), "prompt seed"))
    rules = [None, StateChange(0.3), OutputKL(0.02), StableArgmax(2)]
    exits = [data.draw(st.sampled_from(rules)) for _ in prompts]
    steps = [data.draw(st.integers(2, 6)) for _ in prompts]
    common = {
        "max_new_tokens": data.draw(st.integers(1, 8), "new"),
        "temperature": data.draw(st.sampled_from([0.0, 0.8]), "temperature"),
        "warm_start": data.draw(st.booleans(), "warm start"),
        "stop": (3, 4, 5),
        "cache_budget": data.draw(st.sampled_from([None, 1, 2, 3]), "budget"),
    }
    slots = data.draw(st.integers(1, 4), "slots")
    found = decode_refilled(model, prompts, Decoding(exit=exits, num_steps=steps, **common), Refill(slots))
    for i, prompt in enumerate(prompts):
        # A shared budget counts slots modulo the deepest request's steps only where that is smaller.
        alone = decode(model, [prompt], Decoding(exit=exits[i], num_steps=steps[i], **common), requests=[i])
        assert found.tokens[i] == alone.tokens[0]
        assert found.steps[i] == alone.steps[0]
    assert found.computed_steps == found.core_steps
