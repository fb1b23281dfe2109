"""Text streams and stop strings across tokens and characters, for several kinds of tokenizers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recurrent_depth.generation.text import StopStrings, TextStream, truncate_at


def by_bytes(ids):
    """Decode ids that are bytes, as the smallest tokens of a byte-level tokenizer."""
    return bytes(ids).decode(errors="replace")


def by_words(ids):
    """Decode words without the space before the first one, as sentencepiece does."""
    return " ".join(["one", "two", "three", "four"][i] for i in ids)


characters = st.characters(codec="utf-8", exclude_characters="\N{REPLACEMENT CHARACTER}")


@settings(max_examples=50, deadline=None)
@given(st.text(characters, max_size=12), st.text(characters, min_size=1, max_size=3), st.integers(0, 3))
def test_stop_string_ends_a_request_with_the_completing_token(text, stop, cut_at):
    text = text[:cut_at] + stop + text[cut_at:]
    strings = StopStrings(by_bytes, [stop])
    written = 0
    for written, byte in enumerate(text.encode(), start=1):  # noqa: B007
        if strings(7, byte):
            break
    assert text.encode()[:written].decode() == text[: text.index(stop) + len(stop)]
    assert strings.text(7) == text[: text.index(stop)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=8))
def test_text_stream_adds_up_to_the_text(ids):
    stream = TextStream(by_words)
    assert "".join(stream.push(i) for i in ids) + stream.rest() == by_words(ids)


def test_stop_strings_are_per_request_and_apply_after_thinking():
    told = []
    strings = StopStrings(by_bytes, ["ab", "b"], after=ord("|"), then=lambda request, token: told.append(request))
    ended = [(request, strings(request, ord(char))) for request, char in zip([0, 1, 0, 0, 1, 0], "b||aab", strict=True)]
    assert [ends for _, ends in ended] == [False, False, False, False, False, True]
    assert told == [0, 1, 0, 0, 1, 0]
    assert strings.text(0) == ""
    assert strings.text(1) == "a"
    assert strings.text(5) == ""


def test_stop_strings_refuse_invalid_values():
    with pytest.raises(ValueError, match="list of texts"):
        StopStrings(by_bytes, "end")
    with pytest.raises(ValueError, match="not empty"):
        StopStrings(by_bytes, [""])
    assert truncate_at("a stop b end", ["end", "stop"]) == "a "
