"""Documents as token ids."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

from recurrent_depth.data import chat
from recurrent_depth.data.layout import DataError
from recurrent_depth.data.preparation.documents import Document


class DocumentEncoder:
    """Encodes documents, many at a time; every one opens with the begin-of-text token, if the tokenizer has it.

    Plain text follows as it is, a conversation in the layout of `recurrent_depth.data.chat`. Special tokens that a text
    spells out are ordinary text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer
        begin = tokenizer.token_to_id(chat.BEGIN_TEXT)
        dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.int32
        self.marks: dict[str, int] = {}
        self.opening = np.array([] if begin is None else [begin], dtype=dtype)

    def encode(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """Return the token ids of each document, in 16 bits while the vocabulary fits."""
        texts = [text for document in documents for text, special in _pieces(document) if not special]
        encodings = iter(self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        return [self._ids(document, encodings) for document in documents]

    def _ids(self, document: Document, encodings: Iterator) -> np.ndarray:
        if document.turns and not self.marks:
            check_chat_tokens(self.tokenizer)
            self.marks = {token: int(self.tokenizer.token_to_id(token) or 0) for token in chat.CHAT_TOKENS}
        ids: list[int] = []
        for text, special in _pieces(document):
            ids += [self.marks[text]] if special else next(encodings).ids
        return np.concatenate([self.opening, np.array(ids, dtype=self.opening.dtype)])


def _pieces(document: Document) -> Iterable[tuple[str, bool]]:
    return chat.pieces(document.turns) if document.turns else [(document.text, False)]


def check_chat_tokens(tokenizer: Tokenizer) -> None:
    """Raise unless the tokenizer can write conversations."""
    lacking = [token for token in chat.CHAT_TOKENS if tokenizer.token_to_id(token) is None]
    if lacking:
        raise DataError(
            f"the tokenizer lacks {', '.join(lacking)}, which conversations need; use another tokenizer, or set "
            "chat_formatted: false in their sources"
        )
