"""Stage `lengths`: trace lengths in tokens."""

import pytest

from reasoning.curation.rows import example, ids, reasons, run_stage


def test_trace_tokens_are_counted_and_limited(chat_folder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    rows = [example(i, trace="the quick brown fox " * (3 * i + 1)) for i in range(4)]
    expected = [len(tokenizer(row.trace, add_special_tokens=False)["input_ids"]) for row in rows]
    description = {"stage": "lengths", "tokenizer": str(chat_folder)}
    assert [row.trace_tokens for row in run_stage(description, rows, tmp_path).examples] == expected
    limits = {"at_least": expected[1], "at_most": expected[2]}
    outcome = run_stage(description | limits, rows, tmp_path)
    assert ids(outcome.examples) == [1, 2]
    assert reasons(outcome) == {0: "trace too short", 3: "trace too long"}
    assert outcome.drops[1].detail == f"{expected[3]} tokens"


def test_lengths_error_names_missing_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json does not exist"):
        run_stage({"stage": "lengths", "tokenizer": "nothing.json"}, [example()], tmp_path)
