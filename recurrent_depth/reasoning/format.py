"""How a thought-out answer is written: a chat, and in the reply a trace and an answer between delimiters.

    <prompt with the question><|begin_think|>trace<|end_think|><|begin_answer|>answer<|end_answer|><|end_turn|>

A delimiter must be one token of the tokenizer, since budget forcing (recurrent_depth.generation.forcing) watches for
it. The tokenizers trained here have tokens for the four; on Huginn's the spares `<|c_0|>` ... stand in (`SPARES`).
"""

from typing import Any

from tokenizers import Tokenizer

from recurrent_depth.data.layout import DataError
from recurrent_depth.generation.forcing import ThinkingBudget
from recurrent_depth.reasoning.config import ThinkingFormat

SPARES = ThinkingFormat(begin_think="<|c_0|>", end_think="<|c_1|>", begin_answer="<|c_2|>", end_answer="<|c_3|>")
"""For Huginn's released tokenizer, whose spare tokens were never trained."""


def fast_tokenizer(tokenizer: Any) -> Tokenizer:
    """The tokenizers.Tokenizer of a transformers tokenizer, or the thing itself."""
    inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(inner, Tokenizer):
        raise DataError(f"{type(tokenizer).__name__} is no fast tokenizer; one with a tokenizer.json is needed")
    return inner


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text, with nothing added."""
    return tokenizer.encode(text, add_special_tokens=False).ids


class Formatter:
    """A format on a tokenizer.

    Raises:
        DataError: for a delimiter that is not exactly one token.
    """

    def __init__(self, tokenizer: Any, form: ThinkingFormat) -> None:
        self.tokenizer, self.format = fast_tokenizer(tokenizer), form
        ids = [self._one_token(text) for text in form.delimiters]
        self.begin_think, self.end_think, self.begin_answer, self.end_answer = ids
        self.wait = tuple(encode(self.tokenizer, form.wait))

    def _one_token(self, text: str) -> int:
        ids = encode(self.tokenizer, text)
        if ids != [self.tokenizer.token_to_id(text)]:
            raise DataError(
                f"the delimiter {text!r} is {len(ids)} token(s) of this tokenizer and none of its own; budget forcing "
                "needs one. Map it to a token of the vocabulary, on Huginn's to a spare (<|c_0|>, <|c_1|>, ...)"
            )
        return ids[0]

    def prompt(self, question: str) -> list[int]:
        """Ids a model continues."""
        return encode(self.tokenizer, self.format.prompt_text(question))

    def example(self, question: str, trace: str, answer: str) -> tuple[list[int], list[int], list[int], list[int]]:
        """Ids of prompt, opening of the reply, trace, and closing of the reply."""
        opening, inner, closing = self.format.reply_parts(trace, answer)
        begin, trace_ids, end = (encode(self.tokenizer, text) for text in (opening, inner, closing))
        return self.prompt(question), begin, trace_ids, end

    def stray_delimiter(self, *texts: str) -> str | None:
        """A delimiter or turn mark inside question, trace or answer, where it would break the format."""
        marks = (*self.format.delimiters, self.format.end_turn)
        return next((mark for mark in marks if mark and any(mark in text for text in texts)), None)

    def budget(self, at_most: int, waits: int = 0) -> ThinkingBudget:
        """Budget forcing in this format: at most so many thinking tokens, the end replaced `waits` times."""
        end = (self.end_think, self.begin_answer, *encode(self.tokenizer, self.format.answer_prefix))
        return ThinkingBudget((self.begin_think,), end, self.wait if waits else (), at_most, rounds=waits)

    def read_reply(self, ids: list[int]) -> tuple[int, str]:
        """Thinking tokens and the text of the answer (empty where none was begun) of the ids a model has written."""
        start = ids.index(self.begin_think) + 1 if self.begin_think in ids else 0
        stop = ids.index(self.end_think, start) if self.end_think in ids[start:] else len(ids)
        if self.begin_answer not in ids[stop:]:
            return stop - start, ""
        answer = ids[ids.index(self.begin_answer, stop) + 1 :]
        ends = [answer.index(mark) for mark in (self.end_answer, *encode(self.tokenizer, self.format.end_turn)[:1])
                if mark in answer]  # fmt: skip
        text = self.tokenizer.decode(answer[: min(ends, default=len(answer))])
        return stop - start, text.removeprefix(self.format.answer_prefix.strip()).strip()
