"""Select a small set: s1's draws over domains and lengths, and the choices it was compared with."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from recurrent_depth.checks import check_at_least
from recurrent_depth.data.layout import DataError
from recurrent_depth.reasoning.curation.stages import Context, Outcome, Stage, stage
from recurrent_depth.reasoning.pool import Example


@dataclass(frozen=True)
class Seed:
    """Rows that are selected before any is drawn: those of a source, if correct and long enough.

    Args:
        source: part of the source's name, in any case: `AIME` selects `AIME 2023` too.
        longer_than: tokens that the trace must exceed; null for any length.
        correct: only rows whose trace is known to be correct.
    """

    source: str
    longer_than: int | None = None
    correct: bool = True

    def __post_init__(self) -> None:
        check_at_least("longer_than", self.longer_than, 0)

    def holds(self, example: Example) -> bool:
        """Return whether a row belongs to the seed set."""
        length = example.trace_tokens or 0
        return (
            self.source.lower() in example.source.lower()
            and (example.trace_correct is True or not self.correct)
            and (self.longer_than is None or length > self.longer_than)
        )


@stage("diverse")
@dataclass(frozen=True)
class Diverse(Stage):
    """Select the seed set, then draw a domain and one of its rows until there are `size` rows (s1, appendix C).

    Within a domain the row of rank k has weight 2^-k among the rows that are left. Rank 0 is the longest trace.

    Args:
        size: rows of the set.
        domains: `uniform` draws every domain that has rows left equally often (the paper); `benchmark` does so until
            `uniform_until` rows are selected and then draws a domain as often as the benchmark has it (the released
            script).
        uniform_until: rows drawn uniformly, the seed set included; only for `benchmark`.
        weights: weight of each domain for `benchmark`, as {algebra: 3}; null takes the counts of the stage `domains`.
        by_length: false draws all rows of a domain equally often (the ablation "diverse only").
        seeds: rules of the seed set, as {source: math, longer_than: 5600}.
    """

    size: int
    domains: Literal["uniform", "benchmark"] = "uniform"
    uniform_until: int = 700
    weights: dict[str, float] | None = None
    by_length: bool = True
    seeds: list[Seed] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_at_least("size", self.size, 1)
        check_at_least("uniform_until", self.uniform_until, 0)
        for domain, weight in (self.weights or {}).items():
            check_at_least(f"weights.{domain}", weight, 0)

    def apply(self, examples: list[Example], context: Context) -> Outcome:
        _check_enough(examples, self.size)
        _check_measured(examples, "domain", "domains")
        if self.by_length:
            _check_measured(examples, "trace_tokens", "lengths")
        taken = {e.id: "seed" for e in examples if any(seed.holds(e) for seed in self.seeds)}
        if len(taken) > self.size:
            raise DataError(
                f"the seed set has {len(taken)} rows, more than size {self.size}; raise size or change seeds"
            )
        seeds = len(taken)
        left = ByDomain([example for example in examples if example.id not in taken])
        weights = self._benchmark_weights(context) if self.domains == "benchmark" else {}
        generator = context.generator()
        while len(taken) < self.size:
            weighted = self.domains == "benchmark" and len(taken) >= self.uniform_until
            domain, rule = left.draw_domain(generator, weights if weighted else {})
            taken[left.draw_row(generator, domain, self.by_length).id] = rule
        outcome = _split(examples, taken, context)
        outcome.facts = {"seed set": seeds, "drawn": dict(Counter(rule for rule in taken.values() if rule != "seed"))}
        return outcome

    def _benchmark_weights(self, context: Context) -> Mapping[str, float]:
        found = [facts["benchmark"] for facts in context.facts.values() if "benchmark" in facts]
        weights = self.weights if self.weights is not None else (found[-1] if found else {})
        if not any(weights.values()):
            raise DataError(
                "domains: benchmark needs how often the benchmark has each domain; give `weights`, or `benchmark` to "
                "the stage `domains`"
            )
        return weights


class ByDomain:
    """Rows that are left, by domain, the longest trace first."""

    def __init__(self, examples: Sequence[Example]) -> None:
        rows: dict[str, list[Example]] = defaultdict(list)
        for example in sorted(examples, key=longest_first):
            rows[example.domain or ""].append(example)
        self.rows = dict(sorted(rows.items()))

    def draw_domain(self, generator: np.random.Generator, weights: Mapping[str, float]) -> tuple[str, str]:
        """Return a domain with rows left, and the rule that drew it: uniform if none of them has a weight."""
        names = list(self.rows)
        p = np.array([weights.get(name, 0.0) for name in names])
        if p.sum() > 0:
            return names[generator.choice(len(names), p=p / p.sum())], "benchmark"
        return names[generator.integers(len(names))], "uniform"

    def draw_row(self, generator: np.random.Generator, domain: str, by_length: bool) -> Example:
        """Remove and return one row of a domain. A domain without rows is removed."""
        rows = self.rows[domain]
        row = rows.pop(draw_rank(generator, len(rows)) if by_length else int(generator.integers(len(rows))))
        if not rows:
            del self.rows[domain]
        return row


def draw_rank(generator: np.random.Generator, n: int) -> int:
    """Return a rank k in [0, n) with probability 2^-k / sum of 2^-j, by the inverse of its distribution function."""
    u = generator.random()
    rank = math.floor(-math.log2(1 - u * (1 - 2.0**-n)))
    return min(rank, n - 1)


def longest_first(example: Example) -> tuple[int, str]:
    """Return the key for sorting by trace length; the id decides ties."""
    return -(example.trace_tokens or 0), example.id


@dataclass(frozen=True)
class SizedSelection(Stage):
    """Select rows of a set.

    Args:
        size: rows of the set.
    """

    size: int

    def __post_init__(self) -> None:
        check_at_least("size", self.size, 1)


@stage("random")
@dataclass(frozen=True)
class RandomRows(SizedSelection):
    """Select `size` rows at random, every set equally likely."""

    def apply(self, examples: list[Example], context: Context) -> Outcome:
        _check_enough(examples, self.size)
        rows = context.generator().choice(len(examples), self.size, replace=False)
        return _split(examples, {examples[row].id: "random" for row in rows}, context)


@stage("longest")
@dataclass(frozen=True)
class LongestRows(SizedSelection):
    """Select the `size` rows with the longest traces."""

    def apply(self, examples: list[Example], context: Context) -> Outcome:
        _check_enough(examples, self.size)
        _check_measured(examples, "trace_tokens", "lengths")
        chosen = sorted(examples, key=longest_first)[: self.size]
        return _split(examples, {example.id: "longest" for example in chosen}, context)


def _split(examples: list[Example], taken: Mapping[str, str], context: Context) -> Outcome:
    outcome = Outcome([])
    for example in examples:
        if example.id in taken:
            outcome.examples.append(replace(example, picked=taken[example.id]))
        else:
            outcome.drops.append(context.drop(example, "not selected"))
    return outcome


def _check_enough(examples: Sequence[Example], size: int) -> None:
    if len(examples) < size:
        raise DataError(f"{len(examples)} rows are left, fewer than size {size}; lower size, or drop fewer rows before")


def _check_measured(examples: Sequence[Example], column: str, needed: str) -> None:
    lacking: list[Any] = [example.id for example in examples if getattr(example, column) is None]
    if lacking:
        raise DataError(f"{len(lacking)} rows have no {column} ({lacking[0]}, ...); run the stage `{needed}` before")
