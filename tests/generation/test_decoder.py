"""Decoding in batches against single requests, sampling against its distribution, and thinking budgets."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from recurrent_depth.generation.config import Captured, Refill, Speculation, Wavefront
from recurrent_depth.generation.engine import Decoder
from recurrent_depth.generation.exits import EntropyChange, OutputKL, StateChange
from recurrent_depth.generation.forcing import Forcing, ThinkingBudget
from recurrent_depth.generation.request import Decoding
from recurrent_depth.model.flops import forward_flops
from support import decode, lively_model


@pytest.fixture(scope="module")
def model():
    return lively_model(block_size=64)


@torch.no_grad()
def uncached_greedy(model, prompt, steps, n):
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]), num_steps=steps).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_decoding_equals_the_model_without_a_cache(model):
    prompts = [[5, 6, 7, 8], [9], [1, 2]]
    decoded = decode(model, prompts, Decoding(max_new_tokens=10, num_steps=4))
    assert decoded.tokens == [uncached_greedy(model, prompt, 4, 10) for prompt in prompts]
    assert decoded.core_iterations == 4 * (7 + 3 * 9)
    assert decoded.steps[0] == [4.0] * 10


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_request_does_not_depend_on_its_batch(model, data):
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=2, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    prompts = [torch.randint(50, (n,), generator=generator).tolist() for n in lengths]
    options = Decoding(
        max_new_tokens=8,
        num_steps=data.draw(st.integers(1, 6)),
        exit=data.draw(st.sampled_from([None, StateChange(0.6), OutputKL(0.2)])),
        temperature=data.draw(st.sampled_from([0.0, 0.8])),
        top_k=data.draw(st.sampled_from([None, 10])),
        top_p=data.draw(st.sampled_from([1.0, 0.9])),
        warm_start=data.draw(st.booleans()),
        stop=(3, 4, 5),
        seed=data.draw(st.integers(0, 9)),
    )
    together = decode(model, prompts, options)
    total = 0
    for row, prompt in enumerate(prompts):
        alone = decode(model, [prompt], options, requests=[row])
        assert together.tokens[row] == alone.tokens[0]
        assert together.steps[row] == alone.steps[0]
        total += alone.core_iterations
    assert together.core_iterations == total
    assert all(not set(written[:-1]) & {3, 4, 5} for written in together.tokens)


def test_cache_budget_changes_bytes_and_a_full_one_no_tokens(model):
    options = {"max_new_tokens": 6, "num_steps": 4}
    full = decode(model, [[5, 6, 7]], Decoding(**options))
    assert decode(model, [[5, 6, 7]], Decoding(cache_budget=9, **options)).tokens == full.tokens
    one = decode(model, [[5, 6, 7]], Decoding(cache_budget=1, **options))
    assert one.cache_bytes * (2 + 2 * 4) == full.cache_bytes * (2 + 2 * 1)


def test_sampling_follows_the_distribution(model):
    n, prompt = 4000, [5, 6, 7]
    options = Decoding(max_new_tokens=1, num_steps=2, temperature=1.5, top_k=8, seed=11)
    counts = torch.zeros(50)
    decoded = decode(model, [prompt] * n, options)
    for (token,) in decoded.tokens:
        counts[token] += 1
    with torch.no_grad():
        logits = model(torch.tensor([prompt]), num_steps=2).logits[0, -1] / 1.5
    best = logits.topk(8)
    expected = torch.zeros(50, dtype=torch.float64)
    expected[best.indices] = best.values.softmax(-1) * n
    assert counts[expected == 0].sum() == 0
    used = expected > 0
    chi_square = ((counts[used] - expected[used]) ** 2 / expected[used]).sum()
    assert chi_square < 24.3  # 7 degrees of freedom, p = 0.001
    nucleus = decode(model, [prompt] * 200, Decoding(max_new_tokens=1, num_steps=2, temperature=1.5, top_p=1e-6))
    assert {tokens[0] for tokens in nucleus.tokens} == {int(logits.argmax())}


def test_streaming_returns_the_same_tokens(model):
    seen = [[], []]
    decoded = decode(
        model, [[5, 6], [7]], Decoding(max_new_tokens=5), on_token=lambda row, token: seen[row].append(token)
    )
    assert seen == decoded.tokens


BUDGET = {"begin": (40,), "end": (41,), "wait": (42, 43)}


def test_thinking_stops_at_its_budget_and_waits_are_written(model):
    """The thinking of a model that always writes 7 ends at the budget; early ends of thinking become waits."""
    closed = decode(
        model, [[5, 6]], Decoding(max_new_tokens=12, num_steps=2, thinking=ThinkingBudget(**BUDGET, at_most=4))
    ).tokens[0]
    assert closed[0] == 40
    assert 41 in closed[1:6]
    budget = ThinkingBudget(**BUDGET, at_most=9, at_least=3, rounds=2)
    request = Forcing(budget, [1, 40])
    written = []
    for wanted in (8, 41, 9, 9, 41, 9, 41, 41, 9):
        written.append(request.choose(wanted))
    # 8; the end is replaced by two tokens (the second replaces a 9); 9; a second wait; then the end is accepted
    assert written == [8, 42, 43, 9, 42, 43, 41, 41, 9]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_thinking_budget_holds_for_any_stream(data):
    at_most = data.draw(st.integers(0, 12))
    budget = ThinkingBudget(
        **BUDGET, at_most=at_most, at_least=data.draw(st.integers(0, at_most)), rounds=data.draw(st.integers(0, 3))
    )
    prompt, begun = data.draw(st.sampled_from([([1], 0), ([40], 0), ([40, 41], 0), ([40, 2], 1)]))
    if begun > at_most:
        with pytest.raises(ValueError, match="holds 1 thinking tokens already, at_most is 0"):
            Forcing(budget, prompt)
        return
    request = Forcing(budget, prompt)
    written = []
    for wanted in data.draw(st.lists(st.sampled_from([7, 8, 41]), min_size=30, max_size=30)):
        forced = request.forced()
        written.append(request.choose(wanted))
        assert forced is None or written[-1] == forced
    end = written.index(41)
    thought = (
        begun + written[:end].count(7) + written[:end].count(8) + written[:end].count(42) + written[:end].count(43)
    )
    assert thought <= at_most
    assert written[:end].count(42) <= max(budget.rounds, budget.at_least)
    room = thought + len(budget.wait) <= at_most
    assert thought >= budget.at_least or not room


def test_stop_id_during_thinking_ends_the_thinking():
    request = Forcing(ThinkingBudget(**BUDGET, at_most=9, rounds=1), [40], stop=(3,))
    written = []
    for wanted in (8, 3, 9, 9, 3, 5, 3):
        written.append(request.choose(wanted))
    assert written == [8, 42, 43, 9, 41, 5, 3]


def test_steps_exits_and_budgets_can_differ_by_request(model):
    prompts = [[5, 6, 7], [8], [9, 10]]
    each = {
        "num_steps": [6, 2, 5],
        "min_steps": [1, 2, 5],
        "exit": [StateChange(0.3), None, OutputKL(0.02)],
        "thinking": [None, ThinkingBudget((40,), (41,), at_most=2), None],
    }
    together = decode(model, prompts, Decoding(max_new_tokens=8, **each))
    for row, prompt in enumerate(prompts):
        own = {name: values[row] for name, values in each.items()}
        alone = decode(model, [prompt], Decoding(max_new_tokens=8, **own), requests=[row])
        assert together.tokens[row] == alone.tokens[0]
        assert together.steps[row] == alone.steps[0]
    assert set(together.steps[1]) == {2.0}
    assert set(together.steps[2]) == {5.0}


def test_decoding_errors_say_what_to_change(model):
    with pytest.raises(ValueError, match="num_steps is 0"):
        Decoding(num_steps=[4, 0])
    with pytest.raises(ValueError, match="num_steps is 0"):
        Decoding(num_steps=0)
    with pytest.raises(ValueError, match="at least one token"):
        decode(model, [[]])
    with pytest.raises(ValueError, match="exceed block_size 64"):
        decode(model, [[1] * 60], Decoding(max_new_tokens=5))
    with pytest.raises(ValueError, match="at_least is 5"):
        ThinkingBudget(**BUDGET, at_most=4, at_least=5)
    with pytest.raises(ValueError, match="give its tokens"):
        ThinkingBudget(begin=(1,), end=(2,), rounds=1)


def test_decoded_flops_equal_the_closed_form(model):
    decoded = decode(model, [[5, 6, 7, 8]], Decoding(max_new_tokens=1, num_steps=3))
    assert decoded.flops == forward_flops(model.config, 4, 3)


@pytest.mark.parametrize(
    "mode", [Speculation(1, 5), Speculation(2, 3), Wavefront(steps=1), Wavefront(steps=2)], ids=str
)
def test_flops_of_modes_agree_with_torchs_counter(model, mode):
    """Torch counts no attention here, which is the same share of the FLOPs in all modes within 2%."""
    found, counted = [], []
    for modes in ((), (mode,)):
        with FlopCounterMode(display=False) as counter:
            found.append(decode(model, [[5, 6, 7]], Decoding(max_new_tokens=30, num_steps=4), *modes).flops)
        counted.append(counter.get_total_flops())
    assert found[1] / found[0] == pytest.approx(counted[1] / counted[0], rel=0.02)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": math.nan}, {"temperature": math.inf}, {"temperature": -0.1}, {"top_p": math.nan},
        {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": 0}, {"max_new_tokens": 0}, {"num_steps": 4097},
        {"num_steps": [3, 4097]}, {"min_steps": 0}, {"cache_budget": 0},
    ],
    ids=str,
)  # fmt: skip
def test_decoding_refuses_impossible_values(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*; it must"):
        Decoding(**wrong)


@pytest.mark.parametrize("rule", [StateChange, OutputKL, EntropyChange])
@pytest.mark.parametrize("threshold", [math.nan, math.inf, -1.0])
def test_exit_rules_refuse_impossible_thresholds(rule, threshold):
    with pytest.raises(ValueError, match=r"threshold is .*at least 0"):
        rule(threshold)


def test_exit_prompt_false_runs_the_prompt_at_full_depth(model):
    """The prompt takes all iterations; new tokens stop as they do after such a prompt."""
    prompts, common = [[5, 6, 7], [8]], {"max_new_tokens": 6, "num_steps": 8}
    found = decode(model, prompts, Decoding(exit=StateChange(0.3), exit_prompt=False, **common))
    assert [steps[0] for steps in found.steps] == [8, 8]
    assert min(steps for row in found.steps for steps in row[1:]) < 8
    full = decode(model, prompts, Decoding(**common))
    assert [tokens[0] for tokens in found.tokens] == [tokens[0] for tokens in full.tokens]
    for mode in (Refill(2), Captured()):
        other = decode(model, prompts, Decoding(exit=StateChange(0.3), exit_prompt=False, **common), mode)
        assert (other.tokens, other.steps) == (found.tokens, found.steps)


@pytest.mark.parametrize("mode", [None, Refill(2), Speculation(2, 3), Wavefront(2), Captured()], ids=str)
def test_a_decoder_that_is_kept_writes_what_a_new_one_writes(model, mode):
    """Its memory is used again, by shorter calls and other shapes, and nothing of an earlier call is seen."""
    decoder, memory = Decoder(model, mode), None
    calls = [([[5, 6, 7], [8], [9, 10]], {"num_steps": 6}), ([[8, 9]], {"num_steps": 4}), ([[1]] * 3, {"num_steps": 6}),
             ([[5, 6, 7], [8], [9, 10]], {"num_steps": 6, "temperature": 0.8})]  # fmt: skip
    if not isinstance(mode, Speculation | Wavefront):
        calls.append(([[3, 4], [5]], {"num_steps": 6, "cache_budget": 2, "exit": StateChange(0.4)}))
    for prompts, options in calls:
        chosen = Decoding(max_new_tokens=9, **options)
        kept, new = decoder.generate(prompts, chosen), decode(model, prompts, chosen, mode)
        assert (kept.tokens, kept.steps, kept.cache_bytes) == (new.tokens, new.steps, new.cache_bytes)
        if decoder.memory is not None:
            memory = memory or decoder.memory.data_ptr()
            assert decoder.memory.data_ptr() == memory  # the first call is the largest


def test_a_decoder_goes_on_after_a_call_that_failed(model):
    class Broken(Exception):
        pass

    def fail(request, token):
        raise Broken

    for mode in (None, Captured()):
        decoder, options = Decoder(model, mode), Decoding(max_new_tokens=4, num_steps=3)
        with pytest.raises(Broken):
            decoder.generate([[5, 6]], options, on_token=fail)
        assert decoder.generate([[5, 6]], options).tokens == decode(model, [[5, 6]], options).tokens


def test_decoder_refuses_rows_longer_than_the_block_and_random_initial_states(model):
    with pytest.raises(ValueError, match="a row has 65 tokens and block_size is 64"):
        Decoder(model).logits(torch.zeros(1, 65, dtype=torch.long), 2)
    seeded = SimpleNamespace(
        transformer=model.transformer, lm_head=model.lm_head, freqs_cis=model.freqs_cis,
        model_config=model.model_config, config=SimpleNamespace(state_seed=3),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"config\.state_seed is 3, but decoding starts from a zero state"):
        Decoder(seeded).generate([[5]])
