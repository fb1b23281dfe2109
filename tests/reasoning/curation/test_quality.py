"""Stage `quality`: every filter on example rows."""

import pytest

from reasoning.curation.rows import example, reasons, run_stage
from recurrent_depth.reasoning.curation.quality import FILTERS, quality_filter

ALL = {"stage": "quality"}


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("no trace", {"trace": ""}),
        ("asy drawing", {"question": "See [asy] draw((0,0)); [/asy]. How long?"}),
        ("image reference", {"question": "In ![Image](https://x/y.png), what is x?"}),
        ("image reference", {"question": "Look at ![Image] and say."}),
        ("page marker", {"question": "p12. Find x."}),
        ("page marker", {"question": "p<3>. Find x."}),
        ("broken numbering", {"question": "**1.** Find x. **3.** Find y."}),
        ("broken numbering", {"trace": "**1.** Add. **1.** Subtract."}),
        ("broken numbering", {"question": "**1.** Find x. **2. Find y."}),
        ("generation error", {"trace": "Error: rate limit reached"}),
        ("generation error", {"trace": "Traceback (most recent call last):\n..."}),
        ("generation error", {"trace": "So it goes. " + "Let me check this once more. " * 5}),
    ],
)
def test_quality_filters_drop_faulty_rows_with_reason(tmp_path, reason, changes):
    outcome = run_stage(ALL, [example(0, **changes), example(1)], tmp_path)
    assert reasons(outcome) == {0: reason}
    assert outcome.drops[0].detail


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "AIME 1995", "question": "[asy] draw((0,0)); [/asy] Find x."},
        {"question": "**1.** Find x. **2.** Find y."},
        {"question": "**Note** Find x! [a](b)"},
        {"question": "Stop 12. Find x; 50 p. is the price, p1 is a point."},
        {"trace": "The error is small. Error analysis follows. " + "A. " * 9},
        {"trace": "2 + 2 = 4. " * 3},
    ],
)
def test_quality_filters_keep_rows_without_fault(tmp_path, changes):
    assert not run_stage(ALL, [example(0, **changes)], tmp_path).drops


def test_quality_filters_can_be_chosen_and_added(tmp_path):
    rows = [example(0, trace="", question="[asy]"), example(1, question="A riddle?")]
    assert reasons(run_stage({"stage": "quality", "filters": ["asy drawing"]}, rows, tmp_path)) == {0: "asy drawing"}

    @quality_filter("riddle")
    def riddle(row):
        return "it says so" if "riddle" in row.question else None

    try:
        outcome = run_stage({"stage": "quality", "filters": ["riddle", "asy drawing"]}, rows, tmp_path)
    finally:
        del FILTERS["riddle"]
    assert reasons(outcome) == {0: "asy drawing", 1: "riddle"}
    with pytest.raises(ValueError, match=r"\['riddle'\]; known are .*asy drawing"):
        run_stage({"stage": "quality", "filters": ["riddle"]}, rows, tmp_path)
