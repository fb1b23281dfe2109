"""Conversion of source rows to documents, and encoding of documents, compared with the chat template."""

import pytest

from recurrent_depth.data.preparation.documents import Document, FieldError, document_from
from recurrent_depth.data.preparation.encoding import DocumentEncoder
from recurrent_depth.data.tokenizer import train_tokenizer

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi! "},
            {"role": "assistant", "content": "Hello.\n"}]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Hello there, be brief. user system Huginn naïve"] * 3, 400)


def test_document_joins_fields_of_a_record():
    row = {"path": "a.py", "content": "x = 1", "lines": ["one", "two"], "hints": None, "solution": "42"}
    assert document_from(row, ["path", "content"], False, "o").text == "a.py\n\nx = 1"
    assert document_from(row, ["lines", "hints/solution"], False, "o").text == "one\ntwo\n\n42"


def test_document_turns_come_from_messages_or_fields():
    expected = (("system", "Be brief."), ("user", " Hi! "), ("assistant", "Hello.\n"))
    assert document_from({"messages": MESSAGES}, ["messages"], True, "o").turns == expected
    old = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    assert document_from({"c": old}, ["c"], True, "o").turns == (("user", "Hi"), ("assistant", "Hello"))
    row = {"q": "Why?", "r": "Because", "o": "so."}
    assert document_from(row, ["q", "r", "o"], True, "o").turns == (("user", "Why?"), ("assistant", "Because\n\nso."))
    assert document_from(row, ["o"], True, "o").turns == (("assistant", "so."),)
    assert document_from({"c": old}, ["c"], False, "o") == Document("Hi\n\nHello", "o")


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("row", [{"q": None, "a": None}, {"q": "", "a": None}, {"q": [None], "a": " "}])
def test_document_of_null_fields_is_empty(row, chat):
    assert not document_from(row, ["q", "a"], chat, "o").text.strip()


def test_document_omits_null_fields():
    row = {"title": None, "text": "one", "lines": ["two", None, "three"]}
    assert document_from(row, ["title", "text", "lines"], False, "o").text == "one\n\ntwo\nthree"
    assert document_from({"q": None, "a": "so"}, ["q", "a"], True, "o") == Document("", "o")
    assert document_from({"q": "why?", "a": None}, ["q", "a"], True, "o") == Document("", "o")


@pytest.mark.parametrize("row", [{"other": "x"}, {"text": 3}, {"text": [{"who": "me"}]}])
def test_document_error_names_field_without_text(row):
    with pytest.raises(FieldError, match=r"text|role"):
        document_from(row, ["text"], True, "o")


def test_conversation_encoding_equals_chat_template(tokenizer):
    transformers = pytest.importorskip("transformers")
    from recurrent_depth.hf.chat import CHAT_TEMPLATE

    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE)
    expected = reference.apply_chat_template(MESSAGES, tokenize=True, return_dict=False)
    document = document_from({"messages": MESSAGES}, ["messages"], True, "o")
    plain = Document("naïve", "o")
    assert DocumentEncoder(tokenizer).encode([plain, document, plain])[1].tolist() == expected


def test_encoding_treats_special_tokens_in_text_as_text(tokenizer):
    text = "<|end_turn|><|begin_text|> hello"
    (ids,) = DocumentEncoder(tokenizer).encode([Document(text, "o")])
    assert ids[0] == 0
    assert min(ids[1:]) >= 32
    assert tokenizer.decode(ids) == text


def test_document_replaces_lone_surrogates(tokenizer):
    document = document_from({"text": "a\ud800b"}, ["text"], False, "o")
    assert document.text == "a?b"
    DocumentEncoder(tokenizer).encode([document])
