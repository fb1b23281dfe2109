"""Numbers that judge a way of scaling test-time compute (s1, arXiv 2501.19393, section 3.2), and the iso-FLOP frontier.

A method is a set of runs, each with a compute (thinking tokens, steps of the core, or FLOPs) and an accuracy.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One cell of a grid over hidden steps and visible thinking, means over its questions.

    Attributes:
        label: how the tokens were budgeted, for example `think=64,waits=1`.
        num_steps: steps of the core.
        accuracy, stderr: fractions; n: questions.
        thinking_tokens, new_tokens: written in the trace; written in all.
        core_steps: steps of the core over all tokens, the prompt's included.
        flops: of all of them.
        within_budget: share of the questions whose trace kept its budget.
    """

    label: str
    num_steps: int
    accuracy: float
    stderr: float
    n: int
    thinking_tokens: float
    new_tokens: float
    core_steps: float
    flops: float
    within_budget: float = 1.0


def control(computes: Iterable[float], at_least: float = 0.0, at_most: float = math.inf) -> float:
    """Share of runs whose compute lies within the bounds, which are inclusive."""
    inside = [at_least <= compute <= at_most for compute in computes]
    if not inside:
        raise ValueError("control of no runs is not defined; name at least one")
    return sum(inside) / len(inside)


def scaling(runs: Sequence[tuple[float, float]]) -> float:
    """Mean slope (f(b) - f(a)) / (b - a) over all pairs of runs (compute, accuracy) with b > a.

    Pairs of equal compute have no slope and are left out; NaN where no pair is left.
    """
    pairs = [(low, high) for low, high in itertools.combinations(sorted(runs), 2) if high[0] > low[0]]
    if not pairs:
        return math.nan
    return sum((fb - fa) / (b - a) for (a, fa), (b, fb) in pairs) / len(pairs)


def performance(runs: Sequence[tuple[float, float]]) -> float:
    """The best accuracy of any run."""
    return max(accuracy for _, accuracy in runs)


def frontier(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that no cheaper (or equally cheap) one equals or beats in accuracy, by rising FLOPs."""
    best: list[Cell] = []
    for cell in sorted(cells, key=lambda c: (c.flops, -c.accuracy)):
        if not best or cell.accuracy > best[-1].accuracy:
            best.append(cell)
    return best


def best_within(cells: Sequence[Cell], flops: float) -> Cell | None:
    """The most accurate cell of at most so many FLOPs, the cheapest of equals; None where all cost more."""
    affordable = [cell for cell in cells if cell.flops <= flops]
    return min(affordable, key=lambda c: (-c.accuracy, c.flops), default=None)


def cheapest_reaching(cells: Sequence[Cell], accuracy: float) -> Cell | None:
    """The cheapest cell of at least this accuracy; None where none reaches it."""
    return min((cell for cell in cells if cell.accuracy >= accuracy), key=lambda c: c.flops, default=None)


@dataclass(frozen=True)
class ScalingReport:
    """Control, Scaling and Performance of one line of runs: an axis with the other one held."""

    axis: str
    held: str
    control: float
    scaling: float
    performance: float
    runs: int


def axis_reports(cells: Sequence[Cell]) -> list[ScalingReport]:
    """Along either axis: thinking tokens at each number of steps, steps at each budget of tokens.

    Scaling is accuracy (a fraction) per thinking token, or per step. The steps are obeyed by construction, so Control
    is 1 along them.
    """
    reports = []
    for held, line in _lines(cells, lambda cell: f"r={cell.num_steps}"):
        runs = [(cell.thinking_tokens, cell.accuracy) for cell in line]
        kept = sum(cell.within_budget for cell in line) / len(line)
        reports.append(ScalingReport("thinking tokens", held, kept, scaling(runs), performance(runs), len(runs)))
    for held, line in _lines(cells, lambda cell: cell.label):
        runs = [(float(cell.num_steps), cell.accuracy) for cell in line]
        reports.append(ScalingReport("steps", held, 1.0, scaling(runs), performance(runs), len(runs)))
    return reports


def _lines(cells: Sequence[Cell], name: Callable[[Cell], str]) -> Iterable[tuple[str, list[Cell]]]:
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(name(cell), []).append(cell)
    return groups.items()
