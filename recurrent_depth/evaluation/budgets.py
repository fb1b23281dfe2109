"""Questions put to a model under budgets: so many hidden steps, so many visible tokens, so many forced "Wait".

Everything is counted by the decoding engine: tokens written, steps of the core, FLOPs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from recurrent_depth.data.layout import DataError
from recurrent_depth.evaluation.scaling import Cell
from recurrent_depth.generation.decoding import Decoding, decode
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.reasoning.format import Formatter

Grade = Callable[[Sequence["Question"], Sequence[str]], list[bool]]
"""(questions, answers) -> which are right."""


@dataclass(frozen=True)
class Question:
    """A question and its reference answer."""

    text: str
    answer: str


@dataclass(frozen=True)
class Attempt:
    """One reply.

    Attributes:
        thinking_tokens: between the delimiters, "Wait" included.
        new_tokens: written in all, delimiters included.
        answer: its text; empty where none was begun.
        correct: what the grader says.
    """

    thinking_tokens: int
    new_tokens: int
    answer: str
    correct: bool


@dataclass(frozen=True)
class Attempts:
    """Replies to all questions, and what they took together."""

    replies: list[Attempt]
    core_steps: int
    flops: int

    def cell(self, label: str, num_steps: int, at_most: float = math.inf) -> Cell:
        """Means over the questions; control counts traces of at most `at_most` tokens."""
        n = len(self.replies)
        accuracy = sum(reply.correct for reply in self.replies) / n
        return Cell(
            label=label,
            num_steps=num_steps,
            accuracy=accuracy,
            stderr=math.sqrt(accuracy * (1 - accuracy) / n),
            n=n,
            thinking_tokens=sum(reply.thinking_tokens for reply in self.replies) / n,
            new_tokens=sum(reply.new_tokens for reply in self.replies) / n,
            core_steps=self.core_steps / n,
            flops=self.flops / n,
            within_budget=sum(reply.thinking_tokens <= at_most for reply in self.replies) / n,
        )


@dataclass(frozen=True)
class Examiner:
    """Asks a set of questions and grades the replies.

    Args:
        answer_tokens: tokens an answer may have, delimiters included.
        batch_size: questions decoded together.
    """

    model: RecurrentDepthModel
    formatter: Formatter
    questions: Sequence[Question]
    grade: Grade
    answer_tokens: int = 32
    batch_size: int = 32

    def __post_init__(self) -> None:
        if not self.questions:
            raise DataError("there are no questions; name a file with the fields question and answer")

    def ask(
        self,
        num_steps: int,
        at_most: int,
        waits: int = 0,
        *,
        forced: bool = True,
        hint: str = "",
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Attempts:
        """Put every question once.

        Args:
            num_steps: steps of the core for every token.
            at_most: thinking tokens.
            waits: ends of thinking that are replaced, within the budget.
            forced: end the thinking at `at_most`; otherwise the model stops by itself, within the room of its block.
            hint: words added to the question (a budget that the model is told, and may ignore).
            temperature, seed: of sampling.
        """
        prompts = [self.formatter.prompt(_hinted(question.text, hint)) for question in self.questions]
        budget = self.formatter.budget(at_most, waits) if forced else self.formatter.budget(self._room(prompts))
        options = Decoding(
            max_new_tokens=budget.at_most + self._overhead(),
            num_steps=num_steps,
            temperature=temperature,
            seed=seed,
            stop=(self.formatter.end_answer,),
            thinking=budget,
        )
        tokens, core_steps, flops = self._decode(prompts, options)
        read = [self.formatter.read_reply(ids) for ids in tokens]
        verdicts = self.grade(self.questions, [answer for _, answer in read])
        replies = [
            Attempt(thinking, len(ids), answer, correct)
            for (thinking, answer), ids, correct in zip(read, tokens, verdicts, strict=True)
        ]
        return Attempts(replies, core_steps, flops)

    def grid(self, num_steps: Sequence[int], thinking_tokens: Sequence[int], waits: Sequence[int]) -> list[Cell]:
        """A cell for every combination."""
        return [
            self.ask(r, at_most, count).cell(budget_label(at_most, count), r, at_most)
            for at_most in thinking_tokens
            for count in waits
            for r in num_steps
        ]

    def _overhead(self) -> int:
        """Tokens of a reply besides its trace: delimiters and answer."""
        return 1 + len(self.formatter.budget(0).end) + self.answer_tokens

    def _room(self, prompts: list[list[int]]) -> int:
        """Thinking tokens that fit the model's block after the longest prompt."""
        block, longest = self.model.config.block_size, max(map(len, prompts))
        room = block - longest - self._overhead()
        if room < 1:
            raise ValueError(f"prompts of up to {longest} tokens leave no room to think in a block of {block}")
        return room

    def _decode(self, prompts: list[list[int]], options: Decoding) -> tuple[list[list[int]], int, int]:
        """Prompts of like length together, so that little is padded; results in the order of the questions."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        tokens: list[list[int]] = [[] for _ in prompts]
        core_steps = flops = 0
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            result = decode(self.model, [prompts[index] for index in batch], options, requests=batch)
            for index, written in zip(batch, result.tokens, strict=True):
                tokens[index] = written
            core_steps += result.core_steps
            flops += result.flops
        return tokens, core_steps, flops


def budget_label(at_most: int, waits: int) -> str:
    """A budget in the column `mode`."""
    return f"think={at_most},waits={waits}"


def _hinted(question: str, hint: str) -> str:
    return f"{question} {hint}" if hint else question
