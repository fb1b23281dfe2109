"""Captured decoding: tokens and depths of plain decoding, without decisions on the host within an iteration."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from recurrent_depth.generation.captured import CapturedToken
from recurrent_depth.generation.config import Captured, EngineOptions, Refill
from recurrent_depth.generation.engine import Decoder
from recurrent_depth.generation.exits import RULES, OutputKL, StateChange, exit_rule
from recurrent_depth.generation.forcing import ThinkingBudget
from recurrent_depth.generation.request import Decoding, Requests
from recurrent_depth.model.ops import TORCH_OPS, swiglu, use_ops
from support import decode, lively_model

PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [3]]
THRESHOLDS = {"state-change": 0.3, "kl": 0.1, "entropy": 0.01, "argmax": 3}


@pytest.fixture(scope="module")
def model():
    return lively_model(block_size=64)


def same(model, options, prompts=PROMPTS):
    plain, captured = decode(model, prompts, options), decode(model, prompts, options, Captured())
    assert captured.tokens == plain.tokens
    assert captured.steps == plain.steps
    assert (captured.core_iterations, captured.flops) == (plain.core_iterations, plain.flops)
    assert captured.cache_bytes == plain.cache_bytes
    return captured


@pytest.mark.parametrize("budget", [None, 1, 3])
@pytest.mark.parametrize("rule", [None, *RULES])
def test_captured_decoding_equals_plain_decoding(model, rule, budget):
    chosen = None if rule is None else exit_rule(rule, THRESHOLDS[rule])
    result = same(model, Decoding(max_new_tokens=10, num_steps=8, min_steps=2, exit=chosen, cache_budget=budget))
    taken = {steps for row in result.steps for steps in row[1:]}
    assert taken == {8} if rule is None else min(taken) >= 2 and len(taken) > 1


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_captured_decoding_equals_plain_decoding_for_any_prompts(model, data):
    prompts = data.draw(st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=6), min_size=1, max_size=3))
    steps = data.draw(st.integers(1, 6))
    options = Decoding(
        max_new_tokens=data.draw(st.integers(1, 6)), num_steps=steps, min_steps=data.draw(st.integers(1, steps)),
        exit=StateChange(data.draw(st.sampled_from([0.0, 0.1, 0.5, 10.0]))),
        cache_budget=data.draw(st.sampled_from([None, 1, 2])), stop=(data.draw(st.integers(0, 49)),),
    )  # fmt: skip
    same(model, options, prompts)


def test_captured_decoding_equals_plain_decoding_with_all_options(model):
    same(model, Decoding(max_new_tokens=12, num_steps=5, temperature=1.0, top_k=20, top_p=0.9, seed=4))
    same(model, Decoding(max_new_tokens=8, num_steps=6, exit=StateChange(0.3), warm_start=True))
    stop = decode(model, PROMPTS, Decoding(max_new_tokens=6, num_steps=4)).tokens[1][2]
    stopped = same(model, Decoding(max_new_tokens=6, num_steps=4, stop=(stop,)))
    assert len({len(tokens) for tokens in stopped.tokens}) > 1
    budget = ThinkingBudget((1,), (2,), (4,), at_most=4, at_least=1, rounds=1)
    same(model, Decoding(max_new_tokens=12, num_steps=4, thinking=budget))


def test_captured_decoding_runs_one_iteration_after_the_last_stop(model):
    """The host reads one iteration late that all have stopped; that iteration changes nothing."""
    options = Decoding(max_new_tokens=6, num_steps=12, exit=StateChange(0.3))
    result = decode(model, [[5, 6, 7]], options, Captured())
    plain = decode(model, [[5, 6, 7]], options)
    assert result.tokens == plain.tokens
    late = [min(12, steps + 1) - steps for steps in result.steps[0][1:]]
    assert result.computed_iterations - plain.computed_iterations == sum(late) > 0


def captured_token(model, rule, budget=None):
    """Return a CapturedToken for two requests, after three iterations of the first new token."""
    options = Decoding(max_new_tokens=3, num_steps=3, exit=rule, cache_budget=budget)
    requests = Requests(model, [[1, 2, 3], [4, 5]], options)
    token = CapturedToken(model, requests, requests.stopping[0])
    token.place([0, 1], [3, 3])
    return token


@pytest.mark.parametrize("rule", [None, *RULES])
def test_captured_regions_read_no_value_on_the_host(model, rule):
    """Fake tensors have no values, so any .item(), if, or index by a value raises."""
    chosen = None if rule is None else exit_rule(rule, THRESHOLDS[rule])
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        token = captured_token(model, chosen)
        for number in range(token.num_regions):
            token.run_region(number)
        with pytest.raises(DataDependentOutputException):
            bool(token.going[0])


def test_captured_iteration_is_one_graph_without_breaks(model):
    """The graph that torch.compile(mode="reduce-overhead") would capture, traced by dynamo and run eagerly."""
    expected, token = captured_token(model, OutputKL(0.02)), captured_token(model, OutputKL(0.02))
    rng = torch.Generator().manual_seed(0)
    for static in (expected, token):
        static.running[:], static.active[:] = True, True
        static.memory.fill_(torch.nan)
        static.injected.copy_(torch.randn(static.injected.shape, generator=rng.manual_seed(1), dtype=torch.float64))
        static.state.copy_(torch.randn(static.state.shape, generator=rng, dtype=torch.float64))
    iterate = torch.compile(token.iterate, fullgraph=True, backend="eager")
    with torch.no_grad():
        for i in range(2):
            expected.iterate(i)
            iterate(i)
    torch.testing.assert_close(token.state, expected.state, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(token.cache.entries, expected.cache.entries, rtol=1e-12, atol=1e-12)
    assert torch.equal(token.taken, expected.taken)


def test_rehearsal_does_not_change_the_result(model):
    """All regions run once before capturing; the cached prompts and the following tokens do not change."""
    fresh, rehearsed = (captured_token(model, StateChange(0.3), budget=2) for _ in range(2))
    entries = torch.randn(fresh.cache.entries.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for token in (fresh, rehearsed):
        token.cache.entries[..., :3, :] = entries[..., :3, :]
        token.cache.depths[:, :3] = torch.tensor([1, 3, 2])
    with torch.no_grad():
        rehearsed.rehearse()
        assert torch.equal(rehearsed.cache.entries, fresh.cache.entries)
        assert torch.equal(rehearsed.cache.depths[:, :3], fresh.cache.depths[:, :3])
        for tokens, running in (([4, 5], [True, True]), ([6, 7], [True, False])):
            assert fresh.run(tokens, running) == rehearsed.run(tokens, running)
    for name in ("logits", "state", "taken", "columns", "starts"):
        assert torch.equal(getattr(fresh, name), getattr(rehearsed, name)), name
    assert torch.equal(rehearsed.cache.entries, fresh.cache.entries)
    assert torch.equal(rehearsed.cache.depths[:, :5], fresh.cache.depths[:, :5])


def test_captured_buffers_keep_their_addresses(model):
    """A captured graph contains addresses."""
    token = captured_token(model, OutputKL(0.02), budget=2)
    tensors = {name: value for name, value in vars(token).items() if isinstance(value, torch.Tensor)}
    tensors |= {"entries": token.cache.entries, "depths": token.cache.depths}
    before = {name: value.data_ptr() for name, value in tensors.items()}
    with torch.no_grad():
        token.run([4, 5], [True, True])
        token.run([6, 7], [True, False])
    after = {name: getattr(token, name, getattr(token.cache, name, None)).data_ptr() for name in before}
    assert after == before


def test_captured_is_one_of_the_modes(model):
    mode = EngineOptions(captured=True).mode()
    assert mode == Captured()
    options = Decoding(max_new_tokens=4, num_steps=3)
    assert decode(model, PROMPTS, options, mode).tokens == decode(model, PROMPTS, options).tokens
    with pytest.raises(ValueError, match="refill and captured"):
        EngineOptions(refill=Refill(2), captured=True)


def test_captured_decoding_needs_one_rule_and_one_depth(model):
    with pytest.raises(ValueError, match="one exit rule"):
        decode(model, PROMPTS, Decoding(max_new_tokens=4, exit=[None, StateChange(), None]), Captured())
    with pytest.raises(ValueError, match="one num_steps"):
        decode(model, PROMPTS, Decoding(max_new_tokens=4, num_steps=[1, 2, 3]), Captured())


def test_decoder_captures_once_for_calls_that_fit(model):
    """Buffers are reused for calls with the same shape and rule, also given by name; the tokens do not change."""
    decoder = Decoder(model, Captured())
    rule = exit_rule("state-change", 0.3)
    options = Decoding(max_new_tokens=8, num_steps=6, exit=rule)
    first = decoder.generate(PROMPTS, options)
    kept = decoder.captured
    shorter = Decoding(max_new_tokens=5, num_steps=6, exit=exit_rule("state-change", 0.3), temperature=0.7, seed=3)
    others = [[9, 8], [1, 2, 3], [4]]
    assert decoder.generate(others, shorter).tokens == decode(model, others, shorter).tokens
    assert decoder.generate(PROMPTS, options).tokens == first.tokens
    assert decoder.captured is kept
    for changed in (
        Decoding(max_new_tokens=9, num_steps=6, exit=rule), Decoding(max_new_tokens=8, num_steps=5, exit=rule),
        Decoding(max_new_tokens=8, num_steps=6), Decoding(max_new_tokens=8, num_steps=6, cache_budget=2),
        Decoding(max_new_tokens=8, num_steps=6, exit=rule, warm_start=True),
    ):  # fmt: skip
        before = decoder.captured
        assert decoder.generate(PROMPTS, changed).tokens == decode(model, PROMPTS, changed).tokens
        assert decoder.captured is not before


def test_weights_that_moved_are_captured_again():
    """In place they may change, as in training; a weight that is another tensor lies elsewhere."""
    moving, options = lively_model(block_size=64), Decoding(max_new_tokens=6, num_steps=4)
    decoder = Decoder(moving, Captured())
    decoder.generate(PROMPTS, options)
    kept = decoder.captured
    with torch.no_grad():
        moving.transformer.adapter.weight.mul_(1.5)
    assert decoder.generate(PROMPTS, options).tokens == decode(moving, PROMPTS, options).tokens
    assert decoder.captured is kept
    moving.transformer.adapter.weight = torch.nn.Parameter(moving.transformer.adapter.weight * 0.5)
    assert decoder.generate(PROMPTS, options).tokens == decode(moving, PROMPTS, options).tokens
    assert decoder.captured is not kept


class Doubled(torch.nn.Module):
    """An adapter as a library wraps it: it has the weights of the inner one, and can be switched off."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.enabled, self.scaling = inner, True, {"default": [2]}

    @property
    def weight(self):
        return self.inner.weight

    def forward(self, x):
        return (self.scaling["default"][0] if self.enabled else 1) * self.inner(x)


def replace_adapter(model):
    model.transformer.adapter = Doubled(model.transformer.adapter)


def hook_the_adapter(model):
    model.transformer.adapter.register_forward_hook(lambda module, args, y: 2 * y)


def change_the_operations(model):
    use_ops(model, replace(TORCH_OPS, swiglu=lambda x: 2 * swiglu(x)))


@pytest.mark.parametrize("change", [replace_adapter, hook_the_adapter, change_the_operations])
def test_changed_modules_are_captured_again(change):
    """The addresses of the weights stay the same, but a graph runs the modules it was captured with."""
    changed, options = lively_model(block_size=64), Decoding(max_new_tokens=6, num_steps=4)
    decoder = Decoder(changed, Captured())
    before = decoder.generate(PROMPTS, options)
    kept = decoder.captured
    change(changed)
    after = decoder.generate(PROMPTS, options)
    assert after.tokens == decode(changed, PROMPTS, options).tokens != before.tokens
    assert decoder.captured is not kept


def test_memory_of_captured_decoding_is_freed_with_the_decoder(model):
    """Without waiting for the garbage collector, since other buffers are allocated next."""
    decoder = Decoder(model, Captured())
    decoder.generate(PROMPTS, Decoding(max_new_tokens=2, num_steps=2))
    alive = weakref.ref(decoder.captured)
    gc.disable()
    try:
        decoder.captured = None
        assert alive() is None
    finally:
        gc.enable()


def switch_off(adapter):
    adapter.enabled = False


def scale(adapter):
    adapter.scaling["default"][0] = 3


@pytest.mark.parametrize("change", [switch_off, scale])
def test_changed_settings_of_an_adapter_are_captured_again(change):
    changed, options = lively_model(block_size=64), Decoding(max_new_tokens=6, num_steps=4)
    replace_adapter(changed)
    decoder = Decoder(changed, Captured())
    decoder.generate(PROMPTS, options)
    kept = decoder.captured
    change(changed.transformer.adapter)
    assert decoder.generate(PROMPTS, options).tokens == decode(changed, PROMPTS, options).tokens
    assert decoder.captured is not kept
