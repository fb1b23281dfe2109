"""Metrics of a test-time scaling method (s1, arXiv 2501.19393, section 3.2), and the iso-FLOP frontier.

A method is a set of runs, each with its compute (thinking tokens, core iterations, or FLOPs) and its accuracy.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a grid over core iterations and thinking tokens; values are means over the questions.

    Attributes:
        label: the thinking budget, for example `tokens=64 waits=1`.
        num_steps: core iterations per token.
        accuracy: accuracy as a fraction.
        stderr: standard error of the accuracy.
        n: number of questions.
        thinking_tokens: tokens written in the trace.
        new_tokens: all tokens written.
        core_iterations: core iterations over all tokens, the prompt included.
        flops: FLOPs of prompt and reply.
        within_budget: share of the questions whose trace stayed within its budget.
        mode: budget-forcing, or the name of a control.
    """

    label: str
    num_steps: int
    accuracy: float
    stderr: float
    n: int
    thinking_tokens: float
    new_tokens: float
    core_iterations: float
    flops: float
    within_budget: float = 1.0
    mode: str = "budget-forcing"


def control(computes: Iterable[float], at_least: float = 0.0, at_most: float = math.inf) -> float:
    """Return the share of runs whose compute lies within the bounds, inclusive."""
    inside = [at_least <= compute <= at_most for compute in computes]
    if not inside:
        raise ValueError("there are no runs, so control is not defined; give at least one run")
    return sum(inside) / len(inside)


def scaling(runs: Sequence[tuple[float, float]]) -> float:
    """Return the mean slope (f(b) - f(a)) / (b - a) over all pairs of runs (compute, accuracy) with b > a.

    Pairs with equal compute have no slope and are left out; NaN if no pair is left.
    """
    pairs = [(low, high) for low, high in itertools.combinations(sorted(runs), 2) if high[0] > low[0]]
    if not pairs:
        return math.nan
    return sum((fb - fa) / (b - a) for (a, fa), (b, fb) in pairs) / len(pairs)


def performance(runs: Sequence[tuple[float, float]]) -> float:
    """Return the best accuracy of any run."""
    return max(accuracy for _, accuracy in runs)


def frontier(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells that are more accurate than every other cell of at most their FLOPs, by increasing FLOPs."""
    best: list[Cell] = []
    for cell in sorted(cells, key=lambda c: (c.flops, -c.accuracy)):
        if not best or cell.accuracy > best[-1].accuracy:
            best.append(cell)
    return best


def best_within(cells: Sequence[Cell], flops: float) -> Cell | None:
    """Return the most accurate cell of at most `flops`, the cheapest if several are equal; None if all cost more."""
    affordable = [cell for cell in cells if cell.flops <= flops]
    return min(affordable, key=lambda c: (-c.accuracy, c.flops), default=None)


def cheapest_reaching(cells: Sequence[Cell], accuracy: float) -> Cell | None:
    """Return the cheapest cell of at least this accuracy; None if no cell reaches it."""
    return min((cell for cell in cells if cell.accuracy >= accuracy), key=lambda c: c.flops, default=None)


@dataclass(frozen=True)
class ScalingReport:
    """Control, Scaling and Performance of the runs along one axis of the grid.

    Attributes:
        axis: the axis that varies.
        held: fixed value of the other axis.
        control: share of traces within their budget.
        scaling: change of accuracy (a fraction) per thinking token, or per iteration.
        performance: best accuracy.
        runs: number of runs.
    """

    axis: str
    held: str
    control: float
    scaling: float
    performance: float
    runs: int


def axis_reports(cells: Sequence[Cell]) -> list[ScalingReport]:
    """Return reports for both axes: thinking tokens at each number of iterations, and iterations at each budget.

    Along the iterations control is always 1.
    """
    reports = []
    for held, line in _lines(cells, lambda cell: f"r={cell.num_steps}"):
        runs = [(cell.thinking_tokens, cell.accuracy) for cell in line]
        kept = sum(cell.within_budget for cell in line) / len(line)
        reports.append(ScalingReport("thinking tokens", held, kept, scaling(runs), performance(runs), len(runs)))
    for held, line in _lines(cells, lambda cell: cell.label):
        runs = [(float(cell.num_steps), cell.accuracy) for cell in line]
        reports.append(ScalingReport("iterations", held, 1.0, scaling(runs), performance(runs), len(runs)))
    return reports


def _lines(cells: Sequence[Cell], name: Callable[[Cell], str]) -> Iterable[tuple[str, list[Cell]]]:
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(name(cell), []).append(cell)
    return groups.items()
