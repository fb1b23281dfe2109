"""Latent best-of-N against single requests, and its rules against brute force."""

import statistics
from collections import Counter

import pytest
import torch

from recurrent_depth.generation.best_of import choose, decode_best_of
from recurrent_depth.generation.config import BestOf, Captured, EngineOptions, Refill, Speculation, Wavefront
from recurrent_depth.generation.engine import Decoder
from recurrent_depth.generation.exits import StateChange
from recurrent_depth.generation.request import Decoded, Decoding
from recurrent_depth.model.recurrence import random_state
from support import decode, lively_model

PROMPTS = [[5, 6, 7, 8], [9], [1, 2]]


@pytest.fixture(scope="module")
def model():
    return lively_model(block_size=64)


def initial_state(model, seed, tokens):
    row, positions = torch.zeros(1, dtype=torch.long), torch.arange(tokens)[None]
    return random_state(model.config, row, positions, seed=seed).double()


@torch.no_grad()
def reference(model, prompt, steps, new, seed):
    """Return tokens, log-probabilities and changes of greedy decoding without a cache, from a random initial state."""
    ids, logs, changes = list(prompt), [], []
    for _ in range(new):
        found = model(
            torch.tensor([ids]), num_steps=steps, input_states=initial_state(model, seed, len(ids)), return_states=True
        )
        before, after = (state[0, -1] for state in found.states[-2:])
        ids.append(int(found.logits[0, -1].argmax()))
        logs.append(found.logits[0, -1].log_softmax(-1)[ids[-1]].item())
        changes.append(((after - before).norm() / after.norm()).item())
    return ids[len(prompt) :], logs, changes


@pytest.mark.parametrize("mode", [None, Refill(2)], ids=str)
def test_decoding_from_a_random_state_equals_the_model_without_a_cache(model, mode):
    """Every request has its own seed, and the state of a token depends on its position, not on padding."""
    options = Decoding(max_new_tokens=6, num_steps=3, state_seed=[4, 7, 0], scores=True)
    found = decode(model, PROMPTS, options, mode)
    for request, (prompt, seed) in enumerate(zip(PROMPTS, (4, 7, 0), strict=True)):
        tokens, logs, changes = reference(model, prompt, 3, 6, seed)
        assert found.tokens[request] == tokens
        assert found.log_probabilities[request] == pytest.approx(logs, rel=1e-6)
        assert found.changes[request] == pytest.approx(changes, rel=1e-6)


def test_random_states_change_the_tokens_of_the_first_iterations(model):
    by_seed = [decode(model, PROMPTS, Decoding(max_new_tokens=6, num_steps=1, state_seed=s)).tokens for s in (0, 1)]
    assert by_seed[0] != by_seed[1]


def test_warm_start_continues_from_the_random_state_of_the_prompt(model):
    options = Decoding(max_new_tokens=6, num_steps=2, state_seed=[4, 7, 0], warm_start=True)
    together = decode(model, PROMPTS, options, Refill(2))
    for request, seed in enumerate((4, 7, 0)):
        alone = decode(model, PROMPTS[request : request + 1], Decoding(6, 2, state_seed=seed, warm_start=True))
        assert together.tokens[request] == alone.tokens[0]


def test_best_of_one_is_plain_decoding(model):
    options = Decoding(max_new_tokens=8, num_steps=4)
    plain = decode(model, PROMPTS, options)
    for rule in ("likelihood", "convergence", "vote"):
        found = decode_best_of(Decoder(model), PROMPTS, options, BestOf(1, rule))
        assert (found.tokens, found.steps, found.flops) == (plain.tokens, plain.steps, plain.flops)
        assert found.chosen == [0, 0, 0]


@pytest.mark.parametrize("mode", [None, Refill(3)], ids=str)
def test_best_of_samples_equal_single_requests_with_their_seeds(model, mode):
    options = {"max_new_tokens": 8, "min_steps": 2, "temperature": 0.7, "exit": StateChange(0.4), "stop": (3, 4)}
    steps = [5, 3, 6]
    best_of = BestOf(4, seed=10)
    found = decode_best_of(Decoder(model, mode), PROMPTS, Decoding(num_steps=steps, **options), best_of)
    flops = 0
    for request, prompt in enumerate(PROMPTS):
        for n, seed in enumerate([None, 11, 12, 13]):
            alone = decode(
                model, [prompt], Decoding(num_steps=steps[request], state_seed=seed, **options), requests=[request]
            )
            assert found.samples.tokens[4 * request + n] == alone.tokens[0]
            assert found.samples.steps[4 * request + n] == alone.steps[0]
            flops += alone.flops
    assert found.flops == flops
    assert len({tuple(tokens) for tokens in found.samples.tokens}) > len(PROMPTS)


def test_best_of_costs_as_much_as_all_its_samples(model):
    options = Decoding(max_new_tokens=8, num_steps=4)
    plain = decode(model, PROMPTS, options)
    found = decode_best_of(Decoder(model), PROMPTS, options, BestOf(5))
    assert (found.flops, found.core_iterations) == (5 * plain.flops, 5 * plain.core_iterations)


@pytest.mark.parametrize("seed", range(5))
def test_best_of_rules_equal_brute_force(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(3, (int(n),), generator=generator).tolist() for n in torch.randint(1, 3, (7,))]
    logs, changes = ([torch.rand(len(t), generator=generator).tolist() for t in tokens] for _ in range(2))
    samples = Decoded(tokens, log_probabilities=[[-v for v in row] for row in logs], changes=changes)
    of = range(1, 7)

    def smallest(rows):
        return min(of, key=lambda s: statistics.fmean(rows[s])) - 1

    assert choose(samples, of, "likelihood") == smallest(logs)
    assert choose(samples, of, "convergence") == smallest(changes)
    counts = Counter(tuple(tokens[s]) for s in of)
    winner = choose(samples, of, "vote")
    assert counts[tuple(tokens[winner + 1])] == max(counts.values())
    assert all(counts[tuple(tokens[s])] < max(counts.values()) for s in range(1, winner + 1))


def test_best_of_vote_compares_what_it_is_given():
    samples = Decoded([[1, 7], [2, 5], [3, 5]])
    assert choose(samples, range(3), "vote") == 0  # all differ: the first
    assert choose(samples, range(3), "vote", answer=lambda tokens: tokens[1]) == 1


def test_best_of_refuses_a_model_that_starts_from_a_zero_state():
    model = lively_model(block_size=32, state_init="zero")
    with pytest.raises(ValueError, match=r"best_of\.samples is 2, but .* state_init is zero.*leave best_of out"):
        decode_best_of(Decoder(model), PROMPTS, Decoding(max_new_tokens=2), BestOf(2))
    assert decode_best_of(Decoder(model), PROMPTS, Decoding(max_new_tokens=2), BestOf(1)).tokens


def test_best_of_refuses_what_it_cannot_be_combined_with(model):
    with pytest.raises(ValueError, match=r"state_seed is 3; .*best_of\.seed"):
        decode_best_of(Decoder(model), PROMPTS, Decoding(state_seed=3), BestOf(2))
    with pytest.raises(ValueError, match="best_of is given together with speculation"):
        EngineOptions(best_of=BestOf(), speculation=Speculation())
    for mode in (Speculation(2, 2), Wavefront(2), Captured()):
        for option in ({"state_seed": 0}, {"scores": True}):
            with pytest.raises(ValueError, match=f"cannot be combined with {next(iter(option))}"):
                decode(model, PROMPTS, Decoding(max_new_tokens=4, num_steps=4, **option), mode)
    with pytest.raises(ValueError, match="samples is 0"):
        BestOf(0)
