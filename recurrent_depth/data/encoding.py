"""Documents as token ids."""

from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

from recurrent_depth.data.documents import Document
from recurrent_depth.data.layout import DataError
from recurrent_depth.data.tokenizer import BEGIN_TEXT

BEGIN_HEADER, END_HEADER, END_TURN = "<|begin_header|>", "<|end_header|>", "<|end_turn|>"
ASSISTANT = "Huginn"
"""How the assistant's role is written."""


class DocumentEncoder:
    """Encodes documents, many at a time; every one opens with the begin-of-text token, if the tokenizer has it.

    Plain text follows as it is. In a conversation every message is a header with the role, two newlines, the trimmed
    text and the end-of-turn token. Special tokens that a text spells out are ordinary text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer
        begin = tokenizer.token_to_id(BEGIN_TEXT)
        dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.int32
        self.opening = np.array([] if begin is None else [begin], dtype=dtype)
        marks = [tokenizer.token_to_id(mark) for mark in (BEGIN_HEADER, END_HEADER, END_TURN)]
        self.marks = [mark for mark in marks if mark is not None]

    def encode(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """Token ids of each document, in 16 bits while the vocabulary fits."""
        segments = [segment for document in documents for segment in _segments(document)]
        encodings = iter(self.tokenizer.encode_batch_fast(segments, add_special_tokens=False))
        return [self._ids(document, encodings) for document in documents]

    def _ids(self, document: Document, encodings: Iterator) -> np.ndarray:
        if not document.turns:
            return np.concatenate([self.opening, self._array(next(encodings).ids)])
        if len(self.marks) < 3:
            raise DataError(f"the tokenizer lacks one of {BEGIN_HEADER}, {END_HEADER}, {END_TURN}; chats need them")
        begin_header, end_header, end_turn = self.marks
        ids: list[int] = []
        for _ in document.turns:
            ids += [begin_header, *next(encodings).ids, end_header, *next(encodings).ids, end_turn]
        return np.concatenate([self.opening, self._array(ids)])

    def _array(self, ids: list[int]) -> np.ndarray:
        return np.array(ids, dtype=self.opening.dtype)


def _segments(document: Document) -> Iterator[str]:
    """The stretches of text between special tokens."""
    if not document.turns:
        yield document.text
    for role, text in document.turns:
        yield ASSISTANT if role == "assistant" else role
        yield "\n\n" + text.strip()
