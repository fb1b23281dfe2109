"""The thinking format: a chat whose reply is a trace and an answer between delimiters.

    <prompt with the question><|begin_think|>trace<|end_think|><|begin_answer|>answer<|end_answer|><|end_turn|>

A delimiter must be one token of the tokenizer, since budget forcing (recurrent_depth.generation.forcing) watches for
it. Tokenizers trained here have tokens for the four. On Huginn's, spare tokens `<|c_0|>` ... replace them (`SPARES`).
"""

from typing import Any

from tokenizers import Tokenizer

from recurrent_depth.data.layout import DataError
from recurrent_depth.generation.forcing import ThinkingBudget
from recurrent_depth.reasoning.config import ThinkingFormat

SPARES = ThinkingFormat(begin_think="<|c_0|>", end_think="<|c_1|>", begin_answer="<|c_2|>", end_answer="<|c_3|>")
"""For Huginn's released tokenizer, whose spare tokens were never trained."""


def fast_tokenizer(tokenizer: Any) -> Tokenizer:
    """Return the tokenizers.Tokenizer of a transformers tokenizer, or the argument if it is one."""
    inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(inner, Tokenizer):
        raise DataError(f"{type(tokenizer).__name__} is not a fast tokenizer; use one with a tokenizer.json")
    return inner


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text without special tokens added."""
    return tokenizer.encode(text, add_special_tokens=False).ids


class Formatter:
    """Writes and reads the format with one tokenizer.

    Raises:
        DataError: if a delimiter is not exactly one token.
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
                f"the delimiter {text!r} is {len(ids)} token(s) of this tokenizer and has no id itself; budget forcing "
                "needs one token. Map it to one of the vocabulary, on Huginn's to a spare (<|c_0|>, <|c_1|>, ...)"
            )
        return ids[0]

    def prompt(self, question: str) -> list[int]:
        """Return the ids that a model continues."""
        return encode(self.tokenizer, self.format.prompt_text(question))

    def example(self, question: str, trace: str, answer: str) -> tuple[list[int], list[int], list[int], list[int]]:
        """Return the ids of prompt, opening of the reply, trace, and closing of the reply."""
        opening, inner, closing = self.format.reply_parts(trace, answer)
        begin, trace_ids, end = (encode(self.tokenizer, text) for text in (opening, inner, closing))
        return self.prompt(question), begin, trace_ids, end

    def stray_delimiter(self, *texts: str) -> str | None:
        """Return a delimiter or turn mark inside question, trace or answer, where it would break the format."""
        marks = (*self.format.delimiters, self.format.end_turn)
        return next((mark for mark in marks if mark and any(mark in text for text in texts)), None)

    def budget(self, at_most: int, waits: int = 0) -> ThinkingBudget:
        """Return budget forcing in this format.

        Args:
            at_most: thinking tokens allowed.
            waits: times that the end of thinking is replaced.
        """
        end = (self.end_think, self.begin_answer, *encode(self.tokenizer, self.format.answer_prefix))
        return ThinkingBudget((self.begin_think,), end, self.wait if waits else (), at_most=at_most, rounds=waits)

    def read_reply(self, ids: list[int]) -> tuple[int, str]:
        """Return the number of thinking tokens and the text of the answer in what a model has written.

        The answer is empty if none was begun.
        """
        start = ids.index(self.begin_think) + 1 if self.begin_think in ids else 0
        stop = ids.index(self.end_think, start) if self.end_think in ids[start:] else len(ids)
        if self.begin_answer not in ids[stop:]:
            return stop - start, ""
        answer = ids[ids.index(self.begin_answer, stop) + 1 :]
        marks = (self.end_answer, *encode(self.tokenizer, self.format.end_turn)[:1])
        ends = [answer.index(mark) for mark in marks if mark in answer]
        text = self.tokenizer.decode(answer[: min(ends, default=len(answer))])
        return stop - start, text.removeprefix(self.format.answer_prefix.strip()).strip()
