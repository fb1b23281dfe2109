"""Thinking format: training rows, prompts and the reading of replies agree."""

import pytest

from recurrent_depth.data.layout import DataError
from recurrent_depth.data.tasks.puzzles import conversation, puzzle_tokenizer
from recurrent_depth.data.tokenizer import train_tokenizer
from recurrent_depth.hf.loading import fast_tokenizer
from recurrent_depth.reasoning.config import ThinkingFormat
from recurrent_depth.reasoning.format import SPARES, Formatter

TEXT = "how many apples are there? there are 7 apples. Answer: wait and count. "


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT * 20], 320)


@pytest.fixture(scope="module")
def chat_tokenizer(tokenizer, tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return fast_tokenizer(file)


def test_format_prompt_equals_chat_template(chat_tokenizer):
    formatter = Formatter(chat_tokenizer, ThinkingFormat())
    question = "  how many apples?\n"
    messages = [{"role": "user", "content": question}]
    expected = chat_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert formatter.prompt(question) == expected


def test_format_example_equals_chat_template_and_reads_back(chat_tokenizer):
    formatter = Formatter(chat_tokenizer, ThinkingFormat(answer_prefix="Answer: "))
    reply = "<|begin_think|>count them<|end_think|><|begin_answer|>Answer: 7<|end_answer|>"
    messages = [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": reply}]
    expected = chat_tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    parts = formatter.example("how many?", " count them ", "7")
    assert [token for part in parts for token in part] == expected
    written = [token for part in parts[1:] for token in part]
    assert formatter.read_reply(written) == (len(parts[2]), "7")


def test_puzzle_rows_match_thinking_format():
    formatter = Formatter(puzzle_tokenizer(), ThinkingFormat())
    parts = formatter.example("cup1 swap01", "swap01 cup0", "cup0")
    words = [formatter.tokenizer.id_to_token(token) for part in parts for token in part]
    assert words == conversation(["cup1", "swap01"], ["swap01", "cup0"], "cup0")


@pytest.mark.parametrize("delimiter", ["</think>", "apples are", "<|begin_text"])
def test_format_refuses_delimiter_of_several_tokens(tokenizer, delimiter):
    with pytest.raises(DataError, match="needs one"):
        Formatter(tokenizer, ThinkingFormat(end_think=delimiter))


def test_format_refuses_delimiter_unknown_to_tokenizer():
    tokenizer = puzzle_tokenizer()  # maps every unknown word to the padding token
    assert len(tokenizer.encode("</think>").ids) == 1
    with pytest.raises(DataError, match="has no id itself"):
        Formatter(tokenizer, ThinkingFormat(end_think="</think>"))


def test_format_uses_spare_tokens_as_delimiters(tokenizer):
    formatter = Formatter(tokenizer, SPARES)
    assert tokenizer.id_to_token(formatter.end_think) == "<|c_1|>"
    assert formatter.read_reply(tokenizer.encode("<|c_0|>one<|c_1|><|c_2|>7<|c_3|>").ids)[1] == "7"


def test_format_refuses_equal_delimiters_and_prompt_without_question():
    with pytest.raises(ValueError, match="different"):
        ThinkingFormat(begin_answer="<|end_think|>")
    with pytest.raises(ValueError, match=r"\{question\}"):
        ThinkingFormat(prompt="Q:")


def test_format_reads_empty_or_partial_answer_of_unfinished_reply(tokenizer):
    formatter = Formatter(tokenizer, ThinkingFormat())
    for text, thinking in (("<|begin_think|>", 0), ("<|begin_think|><|end_think|>", 0), ("", 0)):
        assert formatter.read_reply(tokenizer.encode(text).ids) == (thinking, "")
    unfinished = tokenizer.encode("<|begin_think|><|end_think|><|begin_answer|>7").ids
    assert formatter.read_reply(unfinished) == (0, "7")
