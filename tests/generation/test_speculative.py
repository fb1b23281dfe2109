"""Self-speculation equals plain decoding, for any draft, batch and sampling; fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recurrent_depth.generation.config import Speculation
from recurrent_depth.generation.exits import StateChange
from recurrent_depth.generation.request import Decoding
from recurrent_depth.generation.text import StopStrings
from support import decode, lively_model


@pytest.fixture(scope="module")
def model():
    return lively_model(vocab_size=20)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_speculation_equals_plain_decoding(model, data):
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    prompts = [torch.randint(20, (n,), generator=generator).tolist() for n in lengths]
    options = Decoding(
        max_new_tokens=data.draw(st.integers(1, 30)),
        num_steps=data.draw(st.integers(3, 6)),
        temperature=data.draw(st.sampled_from([0.0, 0.7, 1.5])),
        top_k=data.draw(st.sampled_from([None, 5])),
        stop=data.draw(st.sampled_from([(), (3, 4)])),
        seed=data.draw(st.integers(0, 9)),
    )
    speculation = Speculation(steps=data.draw(st.integers(1, 2)), tokens=data.draw(st.integers(1, 6)))
    plain = decode(model, prompts, options)
    found = decode(model, prompts, options, speculation)
    assert found.tokens == plain.tokens
    assert 0 <= found.accepted <= found.drafted


def test_speculation_accepts_drafts(model):
    prompts = [[5, 6, 7], [8], [9, 10]]
    options = Decoding(max_new_tokens=60, num_steps=6)
    found = decode(model, prompts, options, Speculation(steps=3, tokens=5))
    assert found.tokens == decode(model, prompts, options).tokens
    assert 0 < found.accepted < found.drafted


def test_speculation_can_fill_the_whole_block():
    short = lively_model(vocab_size=20, block_size=16)
    options = Decoding(max_new_tokens=11, num_steps=6)
    prompts = [[5, 6, 7, 8, 9], [3]]
    assert decode(short, prompts, options, Speculation(2, 4)).tokens == decode(short, prompts, options).tokens


def test_speculation_stops_when_streaming_ends_a_request(model):
    options = Decoding(max_new_tokens=20, num_steps=4)
    whole = decode(model, [[5, 6, 7]], options).tokens[0]
    seen = []

    def third(row, token):
        seen.append(token)
        return len(seen) == 3

    found = decode(model, [[5, 6, 7]], options, Speculation(1, 4), on_token=third)
    assert found.tokens[0] == seen == whole[:3]


def test_speculation_refuses_invalid_combinations(model):
    with pytest.raises(ValueError, match="fewer than num_steps 4"):
        decode(model, [[1]], Decoding(num_steps=4), Speculation(4, 2))
    with pytest.raises(ValueError, match="cache_budget 2"):
        decode(model, [[1]], Decoding(num_steps=4, cache_budget=2), Speculation(1, 2))
    with pytest.raises(ValueError, match="exit"):
        decode(model, [[1]], Decoding(num_steps=4, exit=StateChange()), Speculation(1, 2))
    with pytest.raises(ValueError, match="at least 1"):
        Speculation(0, 2)


def test_speculative_sampling_follows_the_distribution(model):
    """Check the third token given the two before it, with drafts that are often wrong."""
    n, prompt = 3000, [5, 6, 7]
    options = Decoding(max_new_tokens=3, num_steps=4, temperature=1.5, top_k=4, seed=5)
    found = decode(model, [prompt] * n, options, Speculation(1, 2))
    assert 0 < found.accepted < found.drafted
    pairs = sorted({tuple(tokens[:2]) for tokens in found.tokens})
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *pair] for pair in pairs]), num_steps=4).logits[:, -1]
    best = (logits / 1.5).topk(4)
    chi_square, freedom = 0.0, 0
    for pair, ids, values in zip(pairs, best.indices, best.values, strict=True):
        thirds = [tokens[2] for tokens in found.tokens if tuple(tokens[:2]) == pair]
        expected = values.softmax(-1) * len(thirds)
        counts = torch.tensor([thirds.count(i) for i in ids.tolist()])
        assert counts.sum() == len(thirds)
        if bool((expected >= 5).all()):
            chi_square += float(((counts - expected) ** 2 / expected).sum())
            freedom += 3
    assert freedom >= 15
    assert chi_square < freedom + 3.3 * (2 * freedom) ** 0.5 + 4  # beyond p = 0.001; the seed is fixed


def test_speculation_stops_at_stop_strings(model):
    letters = "abcdefghijklmnopqrst"
    options = Decoding(max_new_tokens=30, num_steps=4)
    plain = "".join(letters[i] for i in decode(model, [[5, 6, 7]], options).tokens[0])
    stop = plain[6:9]
    strings = StopStrings(lambda ids: "".join(letters[i] for i in ids), [stop])
    found = decode(model, [[5, 6, 7]], options, Speculation(2, 4), on_token=strings)
    assert strings.text(0) == plain[: plain.index(stop)]
    assert len(found.tokens[0]) == plain.index(stop) + 3
