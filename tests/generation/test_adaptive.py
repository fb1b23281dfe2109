"""Per-token exit against brute force: one token at a time, keys and values kept by (token, step, layer), fp64."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recurrent_depth.generation.adaptive import adaptive_forward
from recurrent_depth.generation.cache import RecurrentCache
from recurrent_depth.generation.exits import RULES, OutputKL, StateChange, exit_rule, register
from recurrent_depth.model.attention import on_heads
from recurrent_depth.model.layers import rotary_at
from support import lively_model

R = 6


@pytest.fixture(scope="module")
def model():
    return lively_model(block_size=64)


class AtDepth:
    """A rule that lets each position leave at a step of its own, for the tests."""

    def __init__(self, depths):
        self.depths = torch.as_tensor(depths)  # [B, T]

    def remembers(self, vocab_size):
        return 1

    def converged(self, before, after, read, memory):
        taken = memory.nan_to_num(0.0) + 1
        return taken[..., 0] >= self.depths[-taken.shape[1] :], taken


def exactly(depths):
    """A rule for each row of depths [B, T]."""
    return [AtDepth(row) for row in torch.as_tensor(depths)]


@torch.no_grad()
def brute_force(model, ids, depths, budget):
    """Logits of each token of one unpadded row, token after token, with the depths given.

    Iteration i reads and writes place i mod budget (arXiv 2502.05171, section 6.2); where an earlier token stopped
    before it wrote that place, the nearest place below it that the token did write.
    """
    part, outer = model.transformer, model.transformer.first_core_layer
    core, kept, logits = len(part.core_block), {}, []

    for t, token in enumerate(ids):
        rotary = rotary_at(model.freqs_cis, torch.tensor([[t]]))

        def attend(q, k, v, slot, t=t):
            step, layer = divmod(slot - outer, core) if slot >= outer else (None, slot)
            place = 0 if step is None else step % budget
            kept[t, step is None, place, layer] = (k, v)
            entries = []
            for past in range(t + 1):
                written = [p for p in range(place + 1) if (past, step is None, p, layer) in kept]
                entries.append(kept[past, step is None, max(written), layer])
            keys = torch.cat([k for k, _ in entries], dim=2)
            values = torch.cat([v for _, v in entries], dim=2)
            return torch.softmax(q @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ values

        e = part.run_prelude(part.embed(torch.tensor([[token]])), rotary, on_heads(attend))
        state = part.iterate(torch.zeros_like(e), e, int(depths[t]), rotary, on_heads(attend))
        logits.append(model.lm_head(part.run_coda(state, rotary, on_heads(attend)))[0, 0])
    return torch.stack(logits)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_decoding_in_a_ragged_batch_equals_brute_force(model, data):
    budget = data.draw(st.sampled_from([1, 2, 3, 4, R]), "budget")
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3), "lengths")
    width = max(lengths)
    ids = torch.randint(50, (len(lengths), width), generator=torch.Generator().manual_seed(width))
    depths = torch.tensor([[data.draw(st.integers(1, R)) for _ in range(width)] for _ in lengths])
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    cache = RecurrentCache(model.config, len(lengths), width, num_steps=R, budget=budget, dtype=torch.float64)
    pieces = []
    for t in range(width):
        rule = exactly(depths[:, t : t + 1])
        output = adaptive_forward(model, ids[:, t : t + 1], mask[:, : t + 1], cache, rule, R)
        assert torch.equal(output.depths[:, 0], depths[:, t] * mask[:, t])
        pieces.append(output.logits)
    logits = torch.cat(pieces, dim=1)
    for row, n in enumerate(lengths):
        expected = brute_force(model, ids[row, -n:], depths[row, -n:].tolist(), budget)
        torch.testing.assert_close(logits[row, -n:], expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_parallel_prefill_with_a_full_cache_equals_token_by_token(model, data):
    """With monotone depths, what a token sees of earlier tokens does not depend on when they were run."""
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3), "lengths")
    width = max(lengths)
    ids = torch.randint(50, (len(lengths), width), generator=torch.Generator().manual_seed(7))
    depths = torch.tensor([[data.draw(st.integers(1, R)) for _ in range(width)] for _ in lengths])
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    cache = RecurrentCache(model.config, len(lengths), width, num_steps=R, dtype=torch.float64)
    output = adaptive_forward(model, ids, mask, cache, exactly(depths), R)
    for row, n in enumerate(lengths):
        monotone = depths[row, -n:].cummax(0).values
        assert output.depths[row, -n:].tolist() == monotone.tolist()
        expected = brute_force(model, ids[row, -n:], monotone.tolist(), R)
        torch.testing.assert_close(output.logits[row, -n:], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", RULES)
def test_decisions_in_a_batch_equal_those_alone(model, name):
    threshold = {"state-change": 0.3, "kl": 0.02, "entropy": 0.05, "argmax": 2}[name]
    prompts = [[5, 6, 7, 8, 9], [11, 12], [3]]
    ids = torch.tensor([[0] * (5 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (5 - len(p)) + [1] * len(p) for p in prompts])
    rule = exit_rule(name, threshold)
    cache = RecurrentCache(model.config, 3, 5, num_steps=12, dtype=torch.float64)
    together = adaptive_forward(model, ids, mask, cache, rule, 12)
    taken = set()
    for row, prompt in enumerate(prompts):
        alone_cache = RecurrentCache(model.config, 1, len(prompt), num_steps=12, dtype=torch.float64)
        alone = adaptive_forward(
            model, torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long), alone_cache, rule, 12
        )
        assert together.depths[row, -len(prompt) :].tolist() == alone.depths[0].tolist()
        torch.testing.assert_close(together.logits[row, -len(prompt) :], alone.logits[0], rtol=1e-10, atol=1e-10)
        taken |= set(alone.depths[0].tolist())
    assert min(taken) < 12


def test_without_a_rule_it_is_the_plain_model(model):
    ids = torch.tensor([[5, 6, 7, 8]])
    cache = RecurrentCache(model.config, 1, 4, num_steps=R, dtype=torch.float64)
    output = adaptive_forward(model, ids, torch.ones_like(ids), cache, None, R)
    torch.testing.assert_close(output.logits, model(ids, num_steps=R).logits, rtol=1e-10, atol=1e-10)
    assert output.depths.tolist() == [[R] * 4]
    zero = adaptive_forward(
        model,
        ids,
        torch.ones_like(ids),
        RecurrentCache(model.config, 1, 4, R, dtype=torch.float64),
        StateChange(0.0),
        R,
    )
    assert zero.depths.tolist() == [[R] * 4]


@pytest.mark.parametrize("limit", [0, 10**9])
@pytest.mark.parametrize("budget", [None, 1, 3])
def test_rows_and_tokens_that_have_left_are_not_computed(model, budget, limit, monkeypatch):
    """Steps really run, counted in the core's own calls; keys are read in place or copied."""
    monkeypatch.setattr("recurrent_depth.generation.adaptive.COPY_LIMIT", limit)
    depths = torch.tensor([[1, 2, 2], [4, 4, 6], [2, 2, 3]])
    ids = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    mask = torch.ones_like(ids)
    sizes = []
    step = model.transformer.core_block.step
    monkeypatch.setattr(
        model.transformer.core_block, "step", lambda x, *args: sizes.append(x.shape[0] * x.shape[1]) or step(x, *args)
    )
    cache = RecurrentCache(model.config, 3, 3, num_steps=R, budget=budget, dtype=torch.float64)
    output = adaptive_forward(model, ids, mask, cache, exactly(depths), R)
    # three rows of three tokens; without the first token; row 1 and the last token of row 2; row 1; its last token
    assert sizes == [9, 9, 3 + 3, 3, 1, 1]
    assert output.computed == sum(sizes)
    assert output.depths.tolist() == depths.tolist()
    for row in range(3):
        alone = RecurrentCache(model.config, 1, 3, num_steps=R, budget=budget, dtype=torch.float64)
        expected = adaptive_forward(model, ids[row, None], mask[:1], alone, exactly(depths[row, None]), R)
        torch.testing.assert_close(output.logits[row], expected.logits[0], rtol=1e-10, atol=1e-10)


def test_steps_at_most_and_at_least_differ_by_request(model):
    ids, mask = torch.tensor([[5, 6], [7, 8], [9, 10]]), torch.ones(3, 2, dtype=torch.long)
    cache = RecurrentCache(model.config, 3, 2, num_steps=R, dtype=torch.float64)
    always = StateChange(9.0)
    output = adaptive_forward(model, ids, mask, cache, [always, None, always], [5, 2, 6], [3, 1, 6])
    assert output.depths.tolist() == [[3, 3], [2, 2], [6, 6]]
    for row, steps in enumerate([3, 2, 6]):
        plain = model(ids[row, None], num_steps=steps)
        torch.testing.assert_close(output.logits[row], plain.logits[0], rtol=1e-10, atol=1e-10)


class EveryOther:
    """A user's rule: leaves at an even step, once the state has moved by less than the threshold."""

    def __init__(self, threshold=0.5):
        self.threshold = threshold

    def remembers(self, vocab_size):
        return 1

    def converged(self, before, after, read, memory):
        step = memory.nan_to_num(0.0) + 1
        still = (after - before).norm(dim=-1) < self.threshold * after.norm(dim=-1)
        return still & (step[..., 0] % 2 == 0), step


def test_a_rule_of_ones_own_by_name_and_by_place(model, monkeypatch):
    monkeypatch.setattr("recurrent_depth.generation.exits.RULES", dict(RULES))
    register("every-other", EveryOther)
    with pytest.raises(ValueError, match="choose another name"):
        register("kl", EveryOther)
    named, placed = exit_rule("every-other", 9.0), exit_rule(f"{__name__}:EveryOther", 9.0)
    ids = torch.tensor([[5, 6, 7]])
    for rule in (named, placed):
        cache = RecurrentCache(model.config, 1, 3, num_steps=R, dtype=torch.float64)
        assert adaptive_forward(model, ids, torch.ones_like(ids), cache, rule, R).depths.tolist() == [[2, 2, 2]]
    with pytest.raises(ValueError, match="cannot be imported"):
        exit_rule("no.such.module:Rule")
    with pytest.raises(ValueError, match="is not an exit rule"):
        exit_rule("builtins:dict")


@dataclass
class Unhashable:
    """A user's rule as a plain dataclass, which has equality but no hash."""

    threshold: float = 0.3
    weights: torch.Tensor = field(default_factory=lambda: torch.ones(2))  # equality has no truth value

    def remembers(self, vocab_size):
        return 0

    def converged(self, before, after, read, memory):
        return StateChange(self.threshold).converged(before, after, read, memory)


def test_exit_rules_need_no_hash(model):
    """Each request has a rule object of its own, next to built-in rules; the depths are those of the equal rules."""
    ids = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])

    def depths(rules):
        cache = RecurrentCache(model.config, 3, 3, num_steps=R, dtype=torch.float64)
        return adaptive_forward(model, ids, torch.ones_like(ids), cache, rules, R).depths.tolist()

    expected = depths([StateChange(0.3), StateChange(0.6), OutputKL(0.02)])
    assert depths([Unhashable(0.3), Unhashable(0.6), OutputKL(0.02)]) == expected
    assert len({steps for row in expected for steps in row}) > 1


def test_bad_rules_and_steps_say_what_to_change(model):
    ids = torch.tensor([[5]])
    with pytest.raises(ValueError, match="known rules are state-change"):
        exit_rule("sudden")
    with pytest.raises(ValueError, match=r"exit_threshold is -1\.0"):
        exit_rule("kl", -1.0)
    with pytest.raises(ValueError, match="patience"):
        exit_rule("argmax", 1)
    with pytest.raises(ValueError, match="min_steps 3"):
        adaptive_forward(model, ids, torch.ones_like(ids), RecurrentCache(model.config, 1, 1, 2), None, 2, min_steps=3)
    with pytest.raises(ValueError, match="num_steps has 2 values for 1 requests"):
        adaptive_forward(model, ids, torch.ones_like(ids), RecurrentCache(model.config, 1, 1, 2), None, [2, 2])
    with pytest.raises(ValueError, match="cache was made for, 2"):
        adaptive_forward(model, ids, torch.ones_like(ids), RecurrentCache(model.config, 1, 1, 2), None, 4)
