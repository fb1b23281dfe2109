"""Duplicates, decontamination and quality against rows made by hand and brute force."""

import json

import pytest

from reasoning.curation.rows import example, ids, reasons, run_stage
from recurrent_depth.reasoning.curation.quality import FILTERS, quality_filter

ALL = {"stage": "quality"}


def test_duplicates_differ_in_case_and_white_space_alone(tmp_path):
    questions = ["How many  apples?", "how many\napples?", "How many apples ?", "HOW MANY APPLES?"]
    outcome = run_stage(
        {"stage": "exact_duplicates"}, [example(i, question=q) for i, q in enumerate(questions)], tmp_path
    )
    assert ids(outcome.examples) == [0, 2]
    assert reasons(outcome) == {1: "duplicate question", 3: "duplicate question"}
    assert {drop.detail for drop in outcome.drops} == {"same as pool/0"}


class TestDecontamination:
    TEST = ("one two three four five six seven eight nine", "Short question?")

    def run(self, tmp_path, questions, test=TEST, **options):
        (tmp_path / "test.jsonl").write_text("".join(json.dumps({"problem": q}) + "\n" for q in test))
        against = [{"path": "test.jsonl", "fields": {"question": "problem"}}]
        rows = [example(i, question=question) for i, question in enumerate(questions)]
        return run_stage({"stage": "decontaminate", "against": against, **options}, rows, tmp_path)

    def test_eight_words_in_a_row(self, tmp_path):
        outcome = self.run(
            tmp_path,
            [
                "x TWO three\nfour five six seven  eight nine y",
                "two three four five six seven eight",
                "one two three four 4 five six seven eight nine",
                "short  QUESTION?",
                "A short question?",
            ],
        )
        assert reasons(outcome) == {0: "overlaps test", 3: "overlaps test"}
        assert outcome.drops[0].detail == "two three four five six seven eight nine"
        assert outcome.facts == {"test": {"questions": 2, "shorter than n words": 1}}

    def test_n_is_an_option(self, tmp_path):
        assert ids(self.run(tmp_path, ["two three four", "two four three"], n=3).examples) == [1]

    def test_against_brute_force(self, tmp_path):
        import numpy as np

        generator = np.random.default_rng(0)
        texts = [" ".join(map(str, generator.integers(0, 3, size=generator.integers(3, 12)))) for _ in range(60)]
        test, pool = texts[:10], texts[10:]
        padded = [f" {text} " for text in test]

        def contaminated(question):
            words = question.split()
            grams = [" " + " ".join(words[i : i + 4]) + " " for i in range(len(words) - 3)]
            return question in test or any(gram in text for gram in grams for text in padded)

        expected = [i for i, question in enumerate(pool) if not contaminated(question)]
        assert 0 < len(expected) < len(pool)
        assert ids(self.run(tmp_path, pool, test, n=4).examples) == expected

    def test_a_row_without_a_question_is_an_error(self, tmp_path):
        (tmp_path / "test.jsonl").write_text('{"prompt": "Q"}\n')
        with pytest.raises(ValueError, match=r"row 0: no question.*\['prompt'\]"):
            run_stage({"stage": "decontaminate", "against": [{"path": "test.jsonl"}]}, [example()], tmp_path)


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
def test_faults_of_quality(tmp_path, reason, changes):
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
def test_what_is_no_fault(tmp_path, changes):
    assert not run_stage(ALL, [example(0, **changes)], tmp_path).drops


def test_filters_are_chosen_and_added(tmp_path):
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
