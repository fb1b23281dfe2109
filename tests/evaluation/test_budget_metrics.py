"""Control, Scaling and Performance against published values, and the frontier against brute force."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recurrent_depth.evaluation.budget_metrics import (
    Cell,
    axis_reports,
    best_within,
    cheapest_reaching,
    control,
    frontier,
    performance,
    scaling,
)
from recurrent_depth.evaluation.grid import grid_markdown


def cell(accuracy, flops, label="tokens=0 waits=0", num_steps=1, tokens=0.0, kept=1.0, mode="budget-forcing"):
    return Cell(
        label=label, num_steps=num_steps, accuracy=accuracy, stderr=0.0, n=100, thinking_tokens=tokens,
        new_tokens=tokens, core_iterations=1.0, flops=flops, within_budget=kept, mode=mode,
    )  # fmt: skip


def test_scaling_agrees_with_published_points():
    """AIME24 of s1: 50.0 at 7.0k thinking tokens, 30.0 at 20.7k when traces were cut to short blocks in training."""
    assert scaling([(20.7, 30.0), (7.0, 50.0)]) == pytest.approx(-20.0 / 13.7)
    assert performance([(7.0, 50.0), (20.7, 30.0)]) == 50.0


def test_scaling_is_the_mean_over_pairs():
    runs = [(4.0, 0.5), (1.0, 0.2), (2.0, 0.5)]
    by_hand = ((0.5 - 0.2) / 1 + (0.5 - 0.2) / 3 + 0.0) / 3
    assert scaling(runs) == pytest.approx(by_hand)
    assert scaling([(1.0, 0.2), (1.0, 0.4), (2.0, 0.4)]) == pytest.approx((0.2 + 0.0) / 2)
    assert math.isnan(scaling([(3.0, 0.4)]))


def test_control_agrees_with_published_shares():
    """Token-conditional control keeps 2 of 5 budgets, step-conditional 3 of 5, class-conditional 1 of 2."""
    assert control([900, 7000, 3000, 2000, 1000], at_most=1000) == 0.4
    assert control([5, 6, 7, 1, 9], at_least=5, at_most=7) == 0.6
    assert control([10, 30], at_least=20) == 0.5
    with pytest.raises(ValueError, match="no runs"):
        control([])


cells = st.lists(
    st.tuples(st.integers(0, 20), st.integers(1, 20)).map(lambda pair: cell(pair[0] / 20, float(pair[1]))), min_size=1
)


@settings(deadline=None)
@given(cells, st.integers(0, 21))
def test_frontier_is_what_no_cell_dominates(found, budget):
    best = frontier(found)
    for one in found:
        beaten = any(
            o.flops <= one.flops and o.accuracy >= one.accuracy and (o.flops, o.accuracy) != (one.flops, one.accuracy)
            for o in found
        )
        point = (one.flops, one.accuracy)
        assert (point in [(b.flops, b.accuracy) for b in best]) == (not beaten)
    assert len({b.flops for b in best}) == len(best)
    affordable = [c.accuracy for c in found if c.flops <= budget]
    chosen = best_within(found, float(budget))
    assert (chosen is None) == (not affordable)
    if chosen is not None:
        assert chosen.accuracy == max(affordable)
        assert chosen.flops == min(c.flops for c in found if c.flops <= budget and c.accuracy == chosen.accuracy)
    reaching = cheapest_reaching(found, budget / 21)
    assert (reaching is None) == (max(c.accuracy for c in found) < budget / 21)


def test_axis_reports_cover_both_axes():
    grid = [
        cell(0.2, 1.0, "tokens=0 waits=0", 1, 0.0),
        cell(0.6, 2.0, "tokens=0 waits=0", 3, 0.0),
        cell(0.4, 2.0, "tokens=8 waits=0", 1, 4.0, 0.5),
        cell(0.8, 4.0, "tokens=8 waits=0", 3, 8.0),
    ]
    by_axis = {(r.axis, r.held): r for r in axis_reports(grid)}
    assert by_axis["thinking tokens", "r=1"].scaling == pytest.approx(0.05)
    assert by_axis["thinking tokens", "r=1"].control == 0.75
    assert by_axis["thinking tokens", "r=3"].scaling == pytest.approx(0.025)
    assert by_axis["iterations", "tokens=0 waits=0"].scaling == pytest.approx(0.2)
    assert by_axis["iterations", "tokens=8 waits=0"].performance == 0.8
    table = grid_markdown(grid, [cell(0.9, 9.0, "samples=4 tokens=8", 3, mode="majority")])
    assert "| tokens=8 waits=0 | 40.0 | 80.0 |" in table
    assert "| majority | samples=4 tokens=8 | 3 | 90.0 ± 0.0 |" in table
