"""N-gram overlap with evaluation sets, compared with a direct implementation of its definition."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recurrent_depth.data.decontamination import NgramIndex

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"
QUESTION = "Natalia sold clips to 48 of her friends in April and then half as many clips in May"
sentences = st.lists(st.sampled_from(["a", "B", "c", "d."]), max_size=12)


def test_overlap_ignores_case_and_white_space():
    index = NgramIndex([QUESTION], 8)
    assert index.overlap("Q:  NATALIA sold\nclips to\t48 of her   friends in June") == (
        "natalia sold clips to 48 of her friends"
    )
    assert index.overlap("Natalia sold clips to 48 of my friends in April and then some") is None


@settings(deadline=None)
@given(texts=st.lists(sentences, max_size=4), text=sentences, n=st.integers(1, 5))
def test_overlap_is_first_shared_word_ngram(texts, text, n):
    def runs(words):
        return [tuple(word.lower() for word in words[i : i + n]) for i in range(len(words)) if len(words) - i >= n]

    shared = [run for run in runs(text) if any(run in runs(other) for other in texts)]
    index = NgramIndex([" ".join(other) for other in texts], n)
    assert index.overlap(" ".join(text)) == (" ".join(shared[0]) if shared else None)
    assert index.too_short == sum(len(other) < n for other in texts)


def test_ngram_index_refuses_zero_words():
    with pytest.raises(ValueError, match="at least one word"):
        NgramIndex([], 0)


@pytest.mark.skipif(not GSM8K.is_file(), reason="needs ../shared/data")
def test_overlap_finds_gsm8k_training_questions_that_repeat_test_questions():
    test = [json.loads(line)["question"] for line in GSM8K.read_text().splitlines()]
    train = [json.loads(line)["question"] for line in (GSM8K.parent / "train.jsonl").read_text().splitlines()]
    index = NgramIndex(test, 13)
    assert all(index.overlap(f"Solve this. {question} Thank you.") for question in test if len(question.split()) >= 13)
    shared = sum(index.overlap(question) is not None for question in train)
    assert 0 < shared < len(train) // 20  # few questions share a sentence with the test set
