"""The table of `reasoning_effort`, made from measured accuracies; `recurrent_depth.serving.effort` reads it."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from recurrent_depth.evaluation.table import Result, is_fraction, series

FRACTIONS = {"low": 0.9, "medium": 0.97, "high": 1.0}
"""Fraction of the best measured score that the iterations of an effort must reach."""


def measured_efforts(scores: Mapping[int, float]) -> dict[str, dict[str, int]]:
    """Return a table from the score of a model by num_steps: the fewest iterations that reach a fraction of the best.

    Args:
        scores: higher is better.
    """
    if not scores:
        raise ValueError("scores is empty; give a score for at least one num_steps")
    best = max(scores.values())
    return {
        name: {"num_steps": min(r for r, score in scores.items() if score >= fraction * best)}
        for name, fraction in FRACTIONS.items()
    }


def efforts_of_results(results: Sequence[Result]) -> dict[str, dict[str, int]] | None:
    """Return the table from the mean of all accuracies by num_steps; None if they were measured at one num_steps only.

    A line of results counts if it was measured at every num_steps.
    """
    depths = sorted({result.num_steps for result in results})
    lines = [line for key, line in series(results).items() if is_fraction(key.metric) and len(line) == len(depths)]
    if not lines or len(depths) == 1:
        return None
    return measured_efforts({r: fmean(line[r].value for line in lines) for r in depths})
