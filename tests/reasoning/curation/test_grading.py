"""Grading of answers by rules and by a judge model."""

import time

import pytest

from reasoning.curation.chat_server import asked, chat_server
from reasoning.curation.rows import example, reasons, run_stage
from recurrent_depth.reasoning.curation.grading import Item, RuleGrader
from recurrent_depth.reasoning.curation.stages import Context

SAME = [
    ("72", "72.0"), ("1,000", "1000"), ("1000", "so he has 1,000.00"), ("1/2", "0.5"), (r"\frac{1}{2}", "$0.5$"),
    (r"\frac{1}{2}", r"so \boxed{\frac{2}{4}}"), ("72", "$72"), ("3", "x = 3"), ("18", "18 dollars"), ("x+1", "1+x"),
    (r"2\sqrt{2}", r"\boxed{\sqrt{8}}"), ("2^{10}", "1024"), (r"\{1,2\}", r"$\{2,1\}$"), ("72", "48+24 = 71\n#### 72"),
    ("0.5", "50%"), ("B", "(B)"), ("B", "The answer is B."), ("B", r"\boxed{B}"), ("C", "A car drives. Answer: (C)"),
    ("-5", r"\boxed{-5}"), ("blue", "blue"), ("-1,200", "-$1200.0"),
]  # fmt: skip
DIFFERENT = [
    ("72", "The answer is 71."), ("72", ""), ("72", "48+24 = 72 clips\n#### 71"), ("-5", "5"), ("5", "five"),
    ("x^2", "x^3"), ("12", "a = 12, b = 13"), ("72", "7 2"), ("C", "The answer is B."), ("A", "A car drives."),
    ("1/3", "0.33"), ("blue", "red"), ("204", "I do not know"), ("1,2", "12"), ("12", "1,2"),
]  # fmt: skip


@pytest.fixture(scope="module")
def verdicts():
    """Return the verdicts of one grader on all cases, and the endless case. Its process takes a second to start."""
    hangs = ("9^{9^{9^{9}}}", "9^{9^{9^{9}}+1}")
    cases = [*SAME, hangs, *DIFFERENT]
    found = RuleGrader(timeout_s=3).grade([Item("", *case) for case in cases])
    return dict(zip(cases, found, strict=True)), hangs


@pytest.mark.parametrize("case", SAME)
def test_rule_grader_accepts_equal_answer(verdicts, case):
    assert verdicts[0][case].correct is True


@pytest.mark.parametrize("case", DIFFERENT)
def test_rule_grader_rejects_different_answer(verdicts, case):
    assert verdicts[0][case].correct is False


def test_rule_grader_stops_endless_comparison_and_continues(verdicts):
    found, hangs = verdicts
    assert found[hangs].correct is None
    assert found[hangs].note == "no verdict within 3 s"
    assert found[DIFFERENT[-1]].correct is False


def judging(answer, tmp_path, count=1):
    rows = [example(i, trace_answer=f"about {i}") for i in range(count)]
    with chat_server(answer) as server:
        endpoint = {"url": server.url, "model": "judge", "retries": 0, "allowed_failures": 1.0}
        grader = {"judge": {"writer": {"endpoint": endpoint}}}
        outcome = run_stage({"stage": "grade_traces", "grader": grader, "drop_wrong": True}, rows, tmp_path)
        return outcome, server.requests


@pytest.mark.parametrize(
    ("text", "correct"),
    [("Because.\nYes", True), ("**Yes.**\n\n", True), ("Yes it may be, but\nno", False), ("Yes\nI think", None),
     ("maybe", None), ("", None), ("Yes or no", None)],
)  # fmt: skip
def test_judge_verdict_is_its_last_line(tmp_path, text, correct):
    outcome, requests = judging(lambda body: {"content": text}, tmp_path)
    assert [row.trace_correct for row in outcome.examples] == ([] if correct is False else [correct])
    assert reasons(outcome) == ({0: "trace is wrong"} if correct is False else {})
    assert outcome.facts["undecided"] == (correct is None)
    for part in ("What is 0 plus 1?", "about 0", "Reference answer: 1"):
        assert part in asked(requests[0])


def test_judge_failure_gives_no_verdict(tmp_path):
    outcome, _ = judging(lambda body: 500, tmp_path, 2)
    assert outcome.facts == {"correct": 0, "wrong": 0, "undecided": 2, "no answer to grade": 0}
    assert not outcome.drops


def test_grade_traces_compares_trace_answers(tmp_path):
    rows = [
        example(0, trace_answer="1.0"),
        example(1, trace_answer="#### 7"),
        example(2),
        example(3, trace_correct=True),
    ]
    outcome = run_stage({"stage": "grade_traces"}, rows, tmp_path)
    assert [row.trace_correct for row in outcome.examples] == [True, False, None, True]
    assert outcome.facts == {"correct": 1, "wrong": 1, "undecided": 0, "no answer to grade": 2}


def test_rule_grader_process_ends_after_grading(tmp_path):
    import multiprocessing

    before = {process.pid for process in multiprocessing.active_children()}
    RuleGrader().grade([Item("", "1/2", "0.5")], Context("x", tmp_path, tmp_path))
    time.sleep(0.05)
    assert {process.pid for process in multiprocessing.active_children()} <= before
