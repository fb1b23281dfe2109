"""Refilled batches equal one request at a time, in tokens and depths; fp64."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recurrent_depth.generation.config import Refill
from recurrent_depth.generation.exits import OutputKL, StableArgmax, StateChange
from recurrent_depth.generation.forcing import ThinkingBudget
from recurrent_depth.generation.request import Decoding
from support import decode, lively_model


@pytest.fixture(scope="module")
def model():
    return lively_model(block_size=64)


def random_prompts(lengths, seed, vocab_size=50):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_refilled_batch_equals_one_request_at_a_time(model, data):
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=6), "lengths")
    prompts = random_prompts(lengths, data.draw(st.integers(0, 99), "prompt seed"))
    rules = [None, StateChange(0.6), OutputKL(0.2), StableArgmax(2)]
    exits = [data.draw(st.sampled_from(rules)) for _ in prompts]
    steps = [data.draw(st.integers(2, 6)) for _ in prompts]
    common = {
        "max_new_tokens": data.draw(st.integers(1, 8), "new"),
        "temperature": data.draw(st.sampled_from([0.0, 0.8]), "temperature"),
        "warm_start": data.draw(st.booleans(), "warm start"),
        "stop": (3, 4, 5),
        "cache_budget": data.draw(st.sampled_from([None, 1, 2, 3]), "budget"),
    }
    options = Decoding(exit=exits, num_steps=steps, **common)
    # Keys are copied together where they are small, and read in place where they are large.
    limit, module = data.draw(st.sampled_from([0, 10**9]), "copy limit"), "recurrent_depth.generation.attention"
    with patch(f"{module}.COPY_LIMIT", limit), patch(f"{module}.SELECT_LIMIT", limit):
        lanes = data.draw(st.integers(1, 4), "lanes")
        together = data.draw(st.none() | st.integers(1, lanes), "together")
        found = decode(model, prompts, options, Refill(lanes, together))
    for i, prompt in enumerate(prompts):
        alone = decode(model, [prompt], Decoding(exit=exits[i], num_steps=steps[i], **common), requests=[i])
        assert found.tokens[i] == alone.tokens[0]
        assert found.steps[i] == alone.steps[0]
    assert found.computed_iterations == found.core_iterations


@pytest.mark.parametrize("budget", [None, 1, 2, 4])
def test_refilled_batch_reads_entries_of_tokens_that_stopped_early(model, budget):
    prompts = random_prompts([3, 1, 4], seed=1)
    options = Decoding(max_new_tokens=8, num_steps=6, exit=StateChange(0.6), cache_budget=budget)
    found = decode(model, prompts, options, Refill(2))
    for i, prompt in enumerate(prompts):
        alone = decode(model, [prompt], options, requests=[i])
        assert found.tokens[i] == alone.tokens[0]
        assert found.steps[i] == alone.steps[0]
    assert len({steps for row in found.steps for steps in row[1:]}) > 2


def test_refilled_batch_stays_full(model):
    """Requests with 2 and with 12 iterations per token: in a refilled batch the short ones do not wait."""
    prompts = random_prompts([3] * 12, seed=1)
    steps = [2, 12] * 6
    options = Decoding(max_new_tokens=6, num_steps=steps)
    parts = [slice(first, first + 4) for first in range(0, 12, 4)]
    of_part = [Decoding(max_new_tokens=6, num_steps=steps[part]) for part in parts]
    padded = sum(decode(model, prompts[p], part).core_iterations for p, part in zip(parts, of_part, strict=True))
    found = decode(model, prompts, options, Refill(lanes=4))
    assert found.core_iterations == padded
    longest = 12 * 6  # passes of one long request
    assert found.passes < 3 * longest  # three lockstep batches of four would take three times the longest request
    assert found.passes >= 6 * longest / 4


def test_refilled_batch_honours_thinking_streaming_and_stops(model):
    prompts = random_prompts([4, 2, 6, 1, 3], seed=2)
    thinking = [ThinkingBudget((40,), (41,), at_most=n) if n else None for n in (3, 0, 1, 5, 0)]
    options = Decoding(max_new_tokens=10, num_steps=4, exit=StateChange(0.3), thinking=thinking)
    plain = decode(model, prompts, options)
    seen = [[] for _ in prompts]

    def fourth(row, token):
        seen[row].append(token)
        return row == 2 and len(seen[row]) == 4

    found = decode(model, prompts, options, Refill(2), on_token=fourth)
    assert found.tokens == seen
    assert found.tokens == [*plain.tokens[:2], plain.tokens[2][:4], *plain.tokens[3:]]


def test_refill_refuses_invalid_options(model):
    with pytest.raises(ValueError, match="lanes is 0"):
        Refill(0)
    with pytest.raises(ValueError, match="together is 5"):
        Refill(4, together=5)
    with pytest.raises(ValueError, match="exit has 2 values for 1"):
        decode(model, [[1]], Decoding(max_new_tokens=2, exit=[None, None]), Refill())
    with pytest.raises(ValueError, match="exceed block_size 64"):
        decode(model, [[1] * 60], Decoding(max_new_tokens=5), Refill())
