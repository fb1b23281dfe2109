"""Selection stages: exact probabilities of draws, both published rules, the seed set and the ablations."""

from collections import Counter
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest

from reasoning.curation.rows import example, ids, run_stage
from recurrent_depth.data.layout import DataError
from recurrent_depth.reasoning.curation.selection import draw_rank


def pool(lengths):
    """Return one row per trace length. `lengths` maps a domain to its trace lengths."""
    rows = [(domain, length) for domain, values in lengths.items() for length in values]
    return [example(i, domain=domain, trace_tokens=length) for i, (domain, length) in enumerate(rows)]


def exact_draws(lengths, size, by_length=True):
    """Return the exact probability of every set of drawn rows, by enumeration of ordered draws."""
    rows = pool(lengths)
    result = {}
    for order in permutations(rows, size):
        p, left = Fraction(1), list(rows)
        for row in order:
            domains = {other.domain for other in left}
            mates = sorted((o for o in left if o.domain == row.domain), key=lambda o: (-o.trace_tokens, o.id))
            weights = [Fraction(1, 2**rank) if by_length else Fraction(1) for rank in range(len(mates))]
            p *= Fraction(1, len(domains)) * weights[mates.index(row)] / sum(weights)
            left.remove(row)
        chosen = frozenset(ids(list(order)))
        result[chosen] = result.get(chosen, Fraction(0)) + p
    assert sum(result.values()) == 1
    return result


def assert_distributed(counts, expected, samples):
    """Check counts against exact probabilities by chi-squared. Fixed seeds make the result deterministic."""
    assert set(counts) <= {key for key, p in expected.items() if p}
    statistic = sum((counts[key] - samples * float(p)) ** 2 / (samples * float(p)) for key, p in expected.items())
    freedom = len(expected) - 1
    assert statistic <= freedom + 4 * (2 * freedom) ** 0.5


class TestDraws:
    SAMPLES = 3000

    @pytest.mark.parametrize("n", [1, 2, 5])
    def test_draw_rank_has_weight_two_to_minus_rank(self, n):
        generator = np.random.default_rng(0)
        counts = Counter(draw_rank(generator, n) for _ in range(self.SAMPLES))
        total = sum(Fraction(1, 2**k) for k in range(n))
        assert_distributed(counts, {k: Fraction(1, 2**k) / total for k in range(n)}, self.SAMPLES)

    def test_draw_rank_stays_small_in_large_domain(self):
        generator = np.random.default_rng(0)
        ranks = [draw_rank(generator, 5000) for _ in range(4000)]
        assert max(ranks) < 40
        assert 0.45 < ranks.count(0) / 4000 < 0.55

    @pytest.mark.parametrize("by_length", [True, False])
    def test_diverse_selection_has_exact_probabilities(self, tmp_path, by_length):
        lengths = {"a": [10, 30, 20, 40], "b": [5, 5]}
        description = {"stage": "diverse", "size": 3, "by_length": by_length}
        counts = Counter(
            frozenset(ids(run_stage(description, pool(lengths), tmp_path, seed=seed).examples))
            for seed in range(self.SAMPLES)
        )
        assert_distributed(counts, exact_draws(lengths, 3, by_length), self.SAMPLES)

    def test_diverse_selection_draws_domains_uniformly_until_one_is_empty(self, tmp_path):
        rows = pool({"a": [1] * 4, "b": [1] * 300, "c": [1] * 300})
        chosen = run_stage({"stage": "diverse", "size": 304}, rows, tmp_path).examples
        counts = Counter(row.domain for row in chosen)
        assert counts["a"] == 4
        assert 120 < counts["b"] < 180
        assert {row.picked for row in chosen} == {"uniform"}

    def test_diverse_selection_applies_benchmark_weights_after_uniform_draws(self, tmp_path):
        rows = pool({"a": range(500), "b": range(500), "c": range(500)})
        description = {"stage": "diverse", "size": 600, "domains": "benchmark", "uniform_until": 300}
        outcome = run_stage(description | {"weights": {"a": 3, "b": 1, "z": 9}}, rows, tmp_path)
        by_rule = Counter((row.picked, row.domain) for row in outcome.examples)
        assert outcome.facts["drawn"] == {"uniform": 300, "benchmark": 300}
        assert all(80 < by_rule["uniform", domain] < 120 for domain in "abc")
        assert 200 < by_rule["benchmark", "a"] < 250
        assert by_rule["benchmark", "c"] == 0

    def test_diverse_selection_takes_benchmark_weights_from_domains_stage(self, tmp_path):
        rows = pool({"a": range(50), "b": range(50)})
        description = {"stage": "diverse", "size": 20, "domains": "benchmark", "uniform_until": 0}
        outcome = run_stage(description, rows, tmp_path, facts={"domains": {"benchmark": {"b": 7}}})
        assert {row.domain for row in outcome.examples} == {"b"}
        with pytest.raises(DataError, match="benchmark needs how often"):
            run_stage(description, rows, tmp_path)

    def test_diverse_selection_is_uniform_after_benchmark_domains_are_empty(self, tmp_path):
        rows = pool({"a": range(5), "b": range(50)})
        description = {"stage": "diverse", "size": 20, "domains": "benchmark", "uniform_until": 0, "weights": {"a": 1}}
        outcome = run_stage(description, rows, tmp_path)
        assert outcome.facts["drawn"] == {"benchmark": 5, "uniform": 15}

    def test_diverse_selection_takes_seed_set_first(self, tmp_path):
        rows = [
            example(0, source="AIME 1990", trace_correct=True),
            example(1, source="AIME 1990", trace_correct=False),
            example(2, source="MATH", trace_correct=True, trace_tokens=5601),
            example(3, source="MATH", trace_correct=True, trace_tokens=5600),
            example(4, source="GPQA"),
            *(example(i, source="other") for i in range(5, 30)),
        ]
        rows = [row if row.trace_tokens else example_like(row, trace_tokens=10) for row in rows]
        rows = [example_like(row, domain="d") for row in rows]
        seeds = [{"source": "aime"}, {"source": "gpqa"}, {"source": "math", "longer_than": 5600}]
        outcome = run_stage({"stage": "diverse", "size": 5, "seeds": seeds}, rows, tmp_path)
        assert ids([row for row in outcome.examples if row.picked == "seed"]) == [0, 2]
        assert len(outcome.examples) == 5
        assert outcome.facts == {"seed set": 2, "drawn": {"uniform": 3}}
        with pytest.raises(DataError, match="the seed set has 2 rows, more than size 1"):
            run_stage({"stage": "diverse", "size": 1, "seeds": seeds}, rows, tmp_path)

    @pytest.mark.parametrize("kind", ["diverse", "random", "longest"])
    def test_selection_refuses_fewer_rows_than_size(self, tmp_path, kind):
        with pytest.raises(DataError, match="3 rows are left, fewer than size 4"):
            run_stage({"stage": kind, "size": 4}, pool({"a": [1, 2, 3]}), tmp_path)

    def test_diverse_selection_refuses_rows_without_domain_or_length(self, tmp_path):
        with pytest.raises(DataError, match=r"1 rows have no domain.*stage `domains`"):
            run_stage({"stage": "diverse", "size": 1}, [example(0)], tmp_path)
        with pytest.raises(DataError, match=r"no trace_tokens.*stage `lengths`"):
            run_stage({"stage": "diverse", "size": 1}, [example(0, domain="a")], tmp_path)


def example_like(row, **changes):
    from dataclasses import replace

    return replace(row, **changes)


class TestAblations:
    ROWS = tuple(example(i, trace_tokens=(7 * i) % 10) for i in range(6))

    def test_longest_selection_takes_longest_traces(self, tmp_path):
        outcome = run_stage({"stage": "longest", "size": 2}, list(self.ROWS), tmp_path)
        lengths = {i: (7 * i) % 10 for i in range(6)}
        assert sorted(ids(outcome.examples)) == sorted(sorted(lengths, key=lambda i: -lengths[i])[:2])
        assert {row.picked for row in outcome.examples} == {"longest"}

    def test_random_selection_draws_every_set_equally_often(self, tmp_path):
        samples = 3000
        counts = Counter(
            frozenset(ids(run_stage({"stage": "random", "size": 2}, list(self.ROWS)[:4], tmp_path, seed=seed).examples))
            for seed in range(samples)
        )
        assert_distributed(counts, {key: Fraction(1, 6) for key in counts}, samples)
        assert len(counts) == 6
