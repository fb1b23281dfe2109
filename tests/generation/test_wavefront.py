"""The wavefront sampler: exact mode equals plain decoding, approximate mode a simple reference; fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recurrent_depth.generation.config import EngineOptions, Wavefront
from recurrent_depth.generation.exits import StateChange
from recurrent_depth.generation.request import Decoding
from recurrent_depth.model.attention import on_heads
from recurrent_depth.model.layers import rotary_at
from support import decode, lively_model


@pytest.fixture(scope="module")
def model():
    return lively_model(vocab_size=20)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_exact_wavefront_equals_plain_decoding(model, data):
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4), "lengths")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "prompt seed"))
    prompts = [torch.randint(20, (n,), generator=generator).tolist() for n in lengths]
    options = Decoding(
        max_new_tokens=data.draw(st.integers(1, 20), "new"),
        num_steps=data.draw(st.integers(1, 7), "steps"),
        temperature=data.draw(st.sampled_from([0.0, 0.7, 1.5]), "temperature"),
        top_k=data.draw(st.sampled_from([None, 5]), "top k"),
        stop=data.draw(st.sampled_from([(), (3, 4)]), "stop"),
        seed=data.draw(st.integers(0, 9), "seed"),
    )
    wavefront = Wavefront(
        steps=data.draw(st.integers(1, 4), "steps a pass"), width=data.draw(st.integers(1, 6), "width"), exact=True
    )
    found = decode(model, prompts, options, wavefront)
    plain = decode(model, prompts, options)
    assert found.tokens == plain.tokens
    assert found.steps == plain.steps
    assert 0 <= found.accepted <= found.drafted
    assert found.core_iterations >= plain.core_iterations


@torch.no_grad()
def reference(model, prompt, new, r, wavefront):
    """Run the approximate sampler for one request, with whole windows and one entry per (column, layer)."""
    part, outer = model.transformer, model.transformer.core_block.first_layer
    layers = len(part.core_block)
    kept = {}

    def attend_from(first, writes=None):
        def attend(q, k, v, layer_index):
            layer = layer_index if layer_index < outer else outer + (layer_index - outer) % layers
            for i in range(q.shape[2]):
                if writes is None or writes[i]:
                    kept[layer, first + i] = (k[:, :, i : i + 1], v[:, :, i : i + 1])
            rows = []
            for i in range(q.shape[2]):
                keys, values = (torch.cat([kept[layer, c][n] for c in range(first + i + 1)], dim=2) for n in (0, 1))
                rows.append(torch.softmax(q[:, :, i : i + 1] @ keys.transpose(2, 3) / q.shape[-1] ** 0.5, -1) @ values)
            return torch.cat(rows, dim=2)

        return attend

    def rotary(first, n):
        return rotary_at(model.freqs_cis, torch.arange(first, first + n)[None])

    def read(first, ids):
        return part.run_prelude(part.embed(torch.tensor([ids])), rotary(first, len(ids)), on_heads(attend_from(first)))

    def iterate(first, e, state, writes):
        turn = rotary(first, e.shape[1])
        moved = part.iterate(state, e, 1, turn, on_heads(attend_from(first, writes)))
        return torch.where(torch.tensor(writes)[None, :, None], moved, state)

    def says(first, state):
        turn = rotary(first, state.shape[1])
        return model.lm_head(part.run_coda(state, turn, on_heads(attend_from(first))))[0].argmax(-1).tolist()

    e = read(0, prompt)
    state = torch.zeros_like(e)
    for _ in range(r):
        state = iterate(0, e, state, [True] * len(prompt))
    written = [says(0, state)[-1]]
    window, front = [written[0]], len(prompt)
    settled, since = [True], [0]  # whether all positions before have converged, and the iterations since then
    e = state = None
    passes = 0
    while len(written) < new:
        passes += 1
        fresh = read(front, window)
        if e is not None:
            old = e.shape[1]
            fresh[:, :old] = wavefront.average * e + (1 - wavefront.average) * fresh[:, :old]
        e, start = fresh, torch.zeros_like(fresh)
        if state is not None:
            start[:, : state.shape[1]] = state
        state = start
        taken = [
            min(wavefront.steps, r - n) if calm else wavefront.steps for calm, n in zip(settled, since, strict=True)
        ]
        for i in range(wavefront.steps):
            state = iterate(front, e, state, [i < n for n in taken])
        since = [old + n if calm else 0 for old, n, calm in zip(since, taken, settled, strict=True)]
        moved = ((state - start).norm(dim=-1) / state.norm(dim=-1))[0].tolist()
        done = [delta < wavefront.threshold or n == r for delta, n in zip(moved, since, strict=True)]
        drawn = says(front, state)
        kept_token = [True] + [drawn[j] == window[j + 1] for j in range(len(window) - 1)]
        done = [a and b for a, b in zip(done, kept_token, strict=True)]
        if wavefront.in_order:
            converged = done.index(False) if False in done else len(done)
        else:
            converged = max((j + 1 for j, finished in enumerate(done) if finished), default=0)
        done = [j < converged for j in range(len(window))]
        settled = [j == 0 or (done[j - 1] and kept_token[j]) for j in range(len(window))]
        window = [window[0], *drawn]
        final = max(converged - 1, 0)
        ends = len(written) + final + 1 == new  # no position follows the last token
        if wavefront.width == 1 or (ends and converged == len(done)):
            final = converged
        written += drawn[:final]
        settled, since = [*settled, False], [*since, 0]
        most = min(wavefront.width, new - len(written))  # tokens in flight; the last one predicts the last new token
        front, window = front + final, window[final:][:most]
        settled, since = settled[final:][:most], since[final:][:most]
        settled[0:1] = [True]
        e, state = e[:, final : final + most], state[:, final : final + most]
    return written[:new], passes


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_approximate_wavefront_equals_a_simple_reference(model, data):
    prompt = data.draw(st.lists(st.integers(0, 19), min_size=1, max_size=5), "prompt")
    wavefront = Wavefront(
        steps=data.draw(st.integers(1, 3), "steps"),
        width=data.draw(st.integers(1, 6), "width"),
        threshold=data.draw(st.sampled_from([0.05, 0.3, 0.6]), "threshold"),
        average=data.draw(st.sampled_from([0.0, 0.1, 0.5]), "average"),
        exact=False,
        in_order=data.draw(st.booleans(), "in order"),
    )
    new, r = data.draw(st.integers(2, 14), "new"), data.draw(st.integers(2, 9), "iterations")
    written, passes = reference(model, prompt, new, r, wavefront)
    options = Decoding(max_new_tokens=new, num_steps=r, cache_budget=1)
    found = decode(model, [prompt, [7]], options, wavefront)
    assert found.tokens[0] == written
    assert decode(model, [prompt], options, wavefront).passes == passes


@pytest.mark.parametrize("scale", [1.0, 1.6])
def test_approximate_wavefront_at_published_settings_equals_plain_decoding(scale):
    """On models that converge: a token is written only when the position that reads it has converged too."""
    prompts = [[5, 6, 7], [8], [9, 10], [1, 2, 3, 4]]
    options = Decoding(max_new_tokens=32, num_steps=32, cache_budget=1)
    model = lively_model(scale=scale)
    plain = decode(model, prompts, options).tokens
    found = decode(model, prompts, options, Wavefront(4, exact=False, threshold=0.03))
    assert found.tokens == plain
    looser = decode(model, prompts, options, Wavefront(4, exact=False, threshold=0.3))
    assert looser.computed_iterations < found.computed_iterations


@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_wavefront_of_one_position_equals_plain_decoding_at_any_budget(model, data):
    prompts = [[5, 6, 7], [8]]
    options = Decoding(
        max_new_tokens=8,
        num_steps=data.draw(st.integers(1, 6), "steps"),
        cache_budget=data.draw(st.sampled_from([None, 1, 2, 4]), "budget"),
        temperature=data.draw(st.sampled_from([0.0, 1.0]), "temperature"),
    )
    wavefront = Wavefront(data.draw(st.integers(1, 4), "steps a pass"), width=1, exact=False, threshold=0.0)
    found = decode(model, prompts, options, wavefront)
    assert found.tokens == decode(model, prompts, options).tokens
    assert found.drafted == 0


def test_wavefront_accepts_drafts_and_stops_when_streaming_ends(model):
    prompts = [[5, 6, 7], [8], [9, 10]]
    options = Decoding(max_new_tokens=30, num_steps=12)
    found = decode(model, prompts, options, Wavefront(steps=3, exact=True))
    plain = decode(model, prompts, options)
    assert found.tokens == plain.tokens
    assert 0 < found.accepted < found.drafted
    assert found.passes < 30 * 12 / 3
    seen = []

    def third(row, token):
        seen.append((row, token))
        return row == 0 and sum(r == 0 for r, _ in seen) == 3

    stopped = decode(model, prompts, options, Wavefront(steps=3, exact=True), on_token=third)
    assert stopped.tokens == [plain.tokens[0][:3], *plain.tokens[1:]]
    assert [token for row, token in seen if row == 1] == plain.tokens[1]


def test_wavefront_is_exact_by_default(model):
    """Approximate mode must be chosen explicitly, also on the command line."""
    prompts, options = [[5, 6, 7], [8]], Decoding(max_new_tokens=16, num_steps=8)
    assert Wavefront(steps=2) == EngineOptions(wavefront=Wavefront(2)).mode()
    assert decode(model, prompts, options, Wavefront(steps=2)).tokens == decode(model, prompts, options).tokens


def test_wavefront_refuses_invalid_combinations(model):
    exact = Wavefront(exact=True)
    with pytest.raises(ValueError, match="cache_budget 2 must be at least num_steps 4"):
        decode(model, [[1]], Decoding(num_steps=4, cache_budget=2), exact)
    with pytest.raises(ValueError, match="exit"):
        decode(model, [[1]], Decoding(num_steps=4, exit=StateChange()), exact)
    with pytest.raises(ValueError, match="warm_start"):
        decode(model, [[1]], Decoding(num_steps=4, warm_start=True), exact)
    with pytest.raises(ValueError, match="one num_steps"):
        decode(model, [[1], [2]], Decoding(num_steps=[4, 2]), exact)
    with pytest.raises(ValueError, match="min_steps 9"):
        decode(model, [[1]], Decoding(num_steps=4, min_steps=9), exact)
    with pytest.raises(ValueError, match="at least 1"):
        Wavefront(steps=0)
    with pytest.raises(ValueError, match="threshold"):
        Wavefront(threshold=-1.0)
