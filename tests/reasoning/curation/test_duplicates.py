"""Stages `exact_duplicates` and `decontaminate`, the second compared with brute force."""

import json

import pytest

from reasoning.curation.rows import example, ids, reasons, run_stage


def test_exact_duplicates_ignore_case_and_white_space(tmp_path):
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

    def test_decontamination_drops_questions_that_share_eight_words(self, tmp_path):
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

    def test_decontamination_uses_given_ngram_length(self, tmp_path):
        assert ids(self.run(tmp_path, ["two three four", "two four three"], n=3).examples) == [1]

    def test_decontamination_equals_brute_force(self, tmp_path):
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

    def test_decontamination_refuses_evaluation_row_without_question(self, tmp_path):
        (tmp_path / "test.jsonl").write_text('{"prompt": "Q"}\n')
        with pytest.raises(ValueError, match=r"row 0: no question.*\['prompt'\]"):
            run_stage({"stage": "decontaminate", "against": [{"path": "test.jsonl"}]}, [example()], tmp_path)
