"""Per-token exit against brute force: one token at a time, entries kept by (token, iteration, layer), fp64."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recurrent_depth.generation.cache import RecurrentCache
from recurrent_depth.generation.exits import RULES, OutputKL, StateChange, exit_rule, register
from recurrent_depth.generation.request import Decoding, Stopping
from recurrent_depth.generation.tokens import Tokens
from recurrent_depth.model.attention import on_heads
from recurrent_depth.model.layers import rotary_at
from support import decode, lively_model

R = 6


@pytest.fixture(scope="module")
def model():
    return lively_model(block_size=64)


class AtDepth:
    """An exit rule that stops a token after `depth` iterations."""

    def __init__(self, depth):
        self.depth = depth

    def remembers(self, vocab_size):
        return 1

    def converged(self, before, after, read, memory):
        taken = memory.nan_to_num(0.0) + 1
        return taken[..., 0] >= self.depth, taken


def tokens_of(model, rows, width, num_steps=R, budget=None, released=False):
    cache = RecurrentCache(model.config, rows, width, num_steps, budget, torch.float64, released=released)
    return Tokens(model, cache)


@torch.no_grad()
def run(tokens, rows, stopping, columns=None):
    """Run rows of ids, aligned at the right; return logits [n, V] and depths of each row.

    `stopping` has one value per token; `columns` are the columns to run (default all), row by row.
    """
    width = max(map(len, rows))
    flat = [
        (ids[c - width + len(ids)], lane, c, width - len(ids), stopping[lane][c - width + len(ids)])
        for lane, ids in enumerate(rows)
        for c in columns or range(width)
        if c >= width - len(ids)
    ]
    tokens.start(*map(list, zip(*flat, strict=True)))
    while len(tokens.iterating):
        tokens.advance()
    lanes = list(dict.fromkeys(lane for _, lane, *_ in flat))
    done, last = tokens.finish(lanes)
    logits = tokens.logits(done)[:, 0]
    members = [[n for n, of in enumerate(done.layout.lanes) if of == lane] for lane in lanes]
    torch.testing.assert_close(last, logits[[of[-1] for of in members]], rtol=1e-12, atol=1e-12)
    found = {lane: (logits[of], [done.steps[n] for n in of]) for lane, of in zip(lanes, members, strict=True)}
    return [found.get(lane) for lane in range(len(rows))]


def entry_read(i, depth, budget, released):
    """Return the iteration of a token of `depth` iterations that iteration i of a later token reads, by the docs.

    Place i mod budget holds the last iteration that was written there. For a token that stopped before iteration i the
    last entry is read; by the rule of the released code, that place if the token wrote it, else the deepest below.
    """
    place = min(i % budget, depth - 1) if released else min(i, depth - 1) % budget
    return max(j for j in range(depth) if j % budget == place)


@torch.no_grad()
def brute_force(model, ids, depths, budget, released=False):
    """Return the logits of each token of one unpadded row, computed token by token with the given depths."""
    part, outer = model.transformer, model.transformer.core_block.first_layer
    core, kept, logits = len(part.core_block), {}, []

    for t, token in enumerate(ids):
        rotary = rotary_at(model.freqs_cis, torch.tensor([[t]]))

        def attend(q, k, v, layer_index, t=t):
            i, layer = divmod(layer_index - outer, core) if layer_index >= outer else (None, layer_index)
            kept[t, i, layer] = (k, v)
            read = [
                kept[past, None if i is None else entry_read(i, depths[past], budget, released), layer]
                for past in range(t)
            ]
            keys, values = (torch.cat([entry[n] for entry in [*read, (k, v)]], dim=2) for n in (0, 1))
            return torch.softmax(q @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ values

        e = part.run_prelude(part.embed(torch.tensor([[token]])), rotary, on_heads(attend))
        state = part.iterate(torch.zeros_like(e), e, int(depths[t]), rotary, on_heads(attend))
        logits.append(model.lm_head(part.run_coda(state, rotary, on_heads(attend)))[0, 0])
    return torch.stack(logits)


def drawn_rows(data, rows=3):
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=rows), "lengths")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9), "seed"))
    rows = [torch.randint(50, (n,), generator=generator).tolist() for n in lengths]
    depths = [[data.draw(st.integers(1, R)) for _ in row] for row in rows]
    return rows, depths


def stops(depths, by_rule=True):
    """Return the limits of each token: a rule that stops at its depth, or a maximum number of iterations."""
    return [[Stopping(R, rule=AtDepth(d)) if by_rule else Stopping(d) for d in row] for row in depths]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_exits_in_a_ragged_batch_equal_brute_force(model, data):
    budget = data.draw(st.sampled_from([1, 2, 3, 4, R]), "budget")
    released = data.draw(st.booleans(), "released rule")
    rows, depths = drawn_rows(data)
    width = max(map(len, rows))
    tokens = tokens_of(model, len(rows), width, budget=budget, released=released)
    limits, logits = stops(depths, data.draw(st.booleans(), "by rule")), [[] for _ in rows]
    for column in range(width):
        for row, found in enumerate(run(tokens, rows, limits, [column])):
            if found is not None:
                assert found[1] == [depths[row][column - width + len(rows[row])]]
                logits[row].append(found[0])
    for row, ids in enumerate(rows):
        expected = brute_force(model, ids, depths[row], budget, released)
        torch.testing.assert_close(torch.cat(logits[row]), expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_parallel_prefill_with_exits_equals_token_by_token(model, data):
    """With monotone depths, the entries that a token reads do not depend on when they were computed."""
    rows, depths = drawn_rows(data)
    found = run(tokens_of(model, len(rows), max(map(len, rows))), rows, stops(depths))
    for ids, wanted, (logits, taken) in zip(rows, depths, found, strict=True):
        monotone = torch.tensor(wanted).cummax(0).values.tolist()
        assert taken == monotone
        torch.testing.assert_close(logits, brute_force(model, ids, monotone, R), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", RULES)
def test_exit_decisions_in_a_batch_equal_those_alone(model, name):
    threshold = {"state-change": 0.3, "kl": 0.02, "entropy": 0.05, "argmax": 2}[name]
    prompts = [[5, 6, 7, 8, 9], [11, 12], [3]]
    limits = [[Stopping(12, rule=exit_rule(name, threshold))] * len(prompt) for prompt in prompts]
    together = run(tokens_of(model, 3, 5, 12), prompts, limits)
    taken = set()
    for row, prompt in enumerate(prompts):
        ((logits, depths),) = run(tokens_of(model, 1, len(prompt), 12), [prompt], limits[row : row + 1])
        assert together[row][1] == depths
        torch.testing.assert_close(together[row][0], logits, rtol=1e-10, atol=1e-10)
        taken |= set(depths)
    assert min(taken) < 12


@pytest.mark.parametrize("rule", [None, StateChange(0.0)])
def test_decoding_without_an_exit_equals_the_plain_model(model, rule):
    ids = [5, 6, 7, 8]
    ((logits, depths),) = run(tokens_of(model, 1, 4), [ids], [[Stopping(R, rule=rule)] * 4])
    torch.testing.assert_close(logits, model(torch.tensor([ids]), num_steps=R).logits[0], rtol=1e-10, atol=1e-10)
    assert depths == [R] * 4


@pytest.mark.parametrize("limit", [0, 10**9])
@pytest.mark.parametrize("budget", [None, 1, 3])
def test_stopped_tokens_are_not_computed(model, budget, limit, monkeypatch):
    """Count the iterations in calls of the core, with keys read in place and with keys copied."""
    for name in ("COPY_LIMIT", "SELECT_LIMIT"):
        monkeypatch.setattr(f"recurrent_depth.generation.attention.{name}", limit)
    depths = [[1, 2, 2], [4, 4, 6], [2, 2, 3]]
    rows = [[5, 6, 7], [8, 9, 10], [11, 12, 13]]
    sizes = []
    step = model.transformer.core_block.step
    monkeypatch.setattr(
        model.transformer.core_block, "step", lambda x, *args: sizes.append(x.shape[0] * x.shape[1]) or step(x, *args)
    )
    tokens = tokens_of(model, 3, 3, budget=budget)
    found = run(tokens, rows, stops(depths))
    assert sizes == [sum(d > i for row in depths for d in row) for i in range(R)] == [9, 8, 4, 3, 1, 1]
    assert tokens.computed == sum(sizes)
    for row, (logits, taken) in enumerate(found):
        assert taken == depths[row]
        ((expected, _),) = run(tokens_of(model, 1, 3, budget=budget), [rows[row]], stops(depths[row : row + 1]))
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


def test_num_steps_and_min_steps_can_differ_by_request(model):
    rows, always = [[5, 6], [7, 8], [9, 10]], StateChange(9.0)
    limits = [[Stopping(5, 3, always)] * 2, [Stopping(2)] * 2, [Stopping(6, 6, always)] * 2]
    found = run(tokens_of(model, 3, 2), rows, limits)
    for ids, steps, (logits, depths) in zip(rows, [3, 2, 6], found, strict=True):
        assert depths == [steps, steps]
        plain = model(torch.tensor([ids]), num_steps=steps).logits[0]
        torch.testing.assert_close(logits, plain, rtol=1e-10, atol=1e-10)


class EveryOther:
    """A custom rule: stop at an even iteration when the state has changed by less than the threshold."""

    def __init__(self, threshold=0.5):
        self.threshold = threshold

    def remembers(self, vocab_size):
        return 1

    def converged(self, before, after, read, memory):
        step = memory.nan_to_num(0.0) + 1
        still = (after - before).norm(dim=-1) < self.threshold * after.norm(dim=-1)
        return still & (step[..., 0] % 2 == 0), step


def test_custom_exit_rule_is_found_by_name_and_by_path(model, monkeypatch):
    monkeypatch.setattr("recurrent_depth.generation.exits.RULES", dict(RULES))
    register("every-other", EveryOther)
    with pytest.raises(ValueError, match="choose another name"):
        register("kl", EveryOther)
    named, placed = exit_rule("every-other", 9.0), exit_rule(f"{__name__}:EveryOther", 9.0)
    for rule in (named, placed):
        ((_, depths),) = run(tokens_of(model, 1, 3), [[5, 6, 7]], [[Stopping(R, rule=rule)] * 3])
        assert depths == [2, 2, 2]
    with pytest.raises(ValueError, match="cannot be imported"):
        exit_rule("no.such.module:Rule")
    with pytest.raises(ValueError, match="is not an exit rule"):
        exit_rule("builtins:dict")


@dataclass
class Unhashable:
    """A custom rule as a plain dataclass, which has equality but no hash."""

    threshold: float = 0.3
    weights: torch.Tensor = field(default_factory=lambda: torch.ones(2))  # comparing it gives no single truth value

    def remembers(self, vocab_size):
        return 0

    def converged(self, before, after, read, memory):
        return StateChange(self.threshold).converged(before, after, read, memory)


def test_exit_rules_need_no_hash(model):
    """Requests have separate rule objects, beside built-in rules; the depths equal those of equal hashable rules."""
    prompts = [[5, 6, 7], [8, 9, 10], [11, 12, 13]]

    def steps(*rules):
        return decode(model, prompts, Decoding(max_new_tokens=4, num_steps=R, exit=rules)).steps

    expected = steps(StateChange(0.3), StateChange(0.6), OutputKL(0.02))
    assert steps(Unhashable(0.3), Unhashable(0.6), OutputKL(0.02)) == expected
    assert len({taken for row in expected for taken in row}) > 1


def test_exit_rule_errors_say_what_to_change(model):
    with pytest.raises(ValueError, match="known rules are state-change"):
        exit_rule("sudden")
    with pytest.raises(ValueError, match=r"exit_threshold is -1\.0"):
        exit_rule("kl", -1.0)
    with pytest.raises(ValueError, match="patience"):
        exit_rule("argmax", 1)
    with pytest.raises(ValueError, match="min_steps 3"):
        decode(model, [[5]], Decoding(max_new_tokens=4, num_steps=2, min_steps=3))
    with pytest.raises(ValueError, match="num_steps has 2 values for 1 requests"):
        decode(model, [[5]], Decoding(max_new_tokens=4, num_steps=[2, 2]))
