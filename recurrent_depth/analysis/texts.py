"""Read the texts of an analysis and cut them into windows of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recurrent_depth.terminal import print_line


@dataclass(frozen=True)
class Window:
    """Tokens that run through the model in one pass.

    Attributes:
        name: name of the text, with the part if the text was cut.
        ids: token ids.
        first: number of its first token, counted over all windows.
    """

    name: str
    ids: list[int]
    first: int

    @property
    def columns(self) -> slice:
        """The place of its tokens in arrays over all tokens."""
        return slice(self.first, self.first + len(self.ids))


def read_texts(texts: Sequence[str], files: Sequence[str]) -> list[tuple[str, str]]:
    """Return (name, text) of every text and file.

    Raises:
        ValueError: if a file cannot be read, or a text is empty.
    """
    found = [(f"text {number}", text) for number, text in enumerate(texts, start=1)]
    for path in files:
        try:
            found.append((Path(path).name, Path(path).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"text_file: {path} cannot be read ({error}); give a text file in UTF-8") from error
    for name, text in found:
        if not text.strip():
            raise ValueError(f"{name} is empty; give a text with at least one token")
    return found


def cut(named_ids: Sequence[tuple[str, Sequence[int]]], size: int, max_tokens: int) -> list[Window]:
    """Return windows of at most `size` tokens, and at most `max_tokens` tokens in all."""
    windows: list[Window] = []
    first, left = 0, sum(len(ids) for _, ids in named_ids)
    if left > max_tokens:
        print_line(f"analyze: the texts have {left} tokens; the first {max_tokens} are analysed (max_tokens)")
    for name, ids in named_ids:
        for start in range(0, len(ids), size):
            part = list(ids[start : start + size])[: max_tokens - first]
            if part:
                label = name if len(ids) <= size else f"{name}, part {start // size + 1}"
                windows.append(Window(label, part, first))
                first += len(part)
    return windows


def encode(tokenizer: Any, texts: Sequence[tuple[str, str]]) -> list[tuple[str, list[int]]]:
    """Return (name, token ids) of every text.

    Raises:
        ValueError: if a text has no token that the tokenizer knows.
    """
    encoded = [(name, tokenizer(text, verbose=False)["input_ids"]) for name, text in texts]
    for name, ids in encoded:
        if not ids:
            raise ValueError(f"{name} has no tokens of this model; write it in the words that the model was trained on")
    return encoded


def token_text(tokenizer: Any, token: int) -> str:
    """Return one token as text; bytes that are not a whole character become the replacement character."""
    return tokenizer.decode([token], clean_up_tokenization_spaces=False)
