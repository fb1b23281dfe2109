"""Stop strings across the borders of tokens and characters, for decoders of every kind."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recurrent_depth.generation.text import StopStrings, TextStream, truncate_at


def by_bytes(ids):
    """Every id is a byte, as the smallest tokens of a byte-level tokenizer are."""
    return bytes(ids).decode(errors="replace")


def by_words(ids):
    """A tokenizer that leaves out the space of the first word, as sentencepiece does."""
    return " ".join(["one", "two", "three", "four"][i] for i in ids)


characters = st.characters(codec="utf-8", exclude_characters="\N{REPLACEMENT CHARACTER}")


@settings(max_examples=50, deadline=None)
@given(st.text(characters, max_size=12), st.text(characters, min_size=1, max_size=3), st.integers(0, 3))
def test_a_request_ends_with_the_token_that_completes_the_string(text, stop, cut_at):
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
def test_a_stream_adds_up_to_the_text(ids):
    stream = TextStream(by_words)
    assert "".join(stream.push(i) for i in ids) + stream.rest() == by_words(ids)


def test_requests_are_kept_apart_and_the_end_of_thinking_is_waited_for():
    told = []
    strings = StopStrings(by_bytes, ["ab", "b"], after=ord("|"), then=lambda request, token: told.append(request))
    ended = [(request, strings(request, ord(char))) for request, char in zip([0, 1, 0, 0, 1, 0], "b||aab", strict=True)]
    assert [ends for _, ends in ended] == [False, False, False, False, False, True]
    assert told == [0, 1, 0, 0, 1, 0]
    assert strings.text(0) == ""
    assert strings.text(1) == "a"
    assert strings.text(5) == ""


def test_bad_strings_are_refused():
    with pytest.raises(ValueError, match="list of texts"):
        StopStrings(by_bytes, "end")
    with pytest.raises(ValueError, match="not empty"):
        StopStrings(by_bytes, [""])
    assert truncate_at("a stop b end", ["end", "stop"]) == "a "
