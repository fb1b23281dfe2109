"""Answer questions under thinking budgets: iterations per token, thinking tokens, forced "Wait"s.

Tokens, core iterations and FLOPs are counted in recurrent_depth.generation.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from recurrent_depth.data.layout import DataError
from recurrent_depth.evaluation.budget_metrics import Cell
from recurrent_depth.evaluation.config import BudgetsConfig
from recurrent_depth.generation.engine import Decoder
from recurrent_depth.generation.request import DecodableModel, Decoding
from recurrent_depth.reasoning.curation.answers import Checker
from recurrent_depth.reasoning.format import Formatter
from recurrent_depth.reasoning.pool import load_pool

Grade = Callable[[Sequence["Question"], Sequence[str]], list[bool]]
"""(questions, answers) -> whether each answer is right"""


@dataclass(frozen=True)
class Question:
    """A question and its reference answer."""

    text: str
    answer: str


@dataclass(frozen=True)
class Attempt:
    """One reply.

    Attributes:
        thinking_tokens: tokens between the delimiters, "Wait" included.
        new_tokens: all tokens written, delimiters included.
        answer: text of the answer; empty if there is none.
        correct: result of the grader.
    """

    thinking_tokens: int
    new_tokens: int
    answer: str
    correct: bool


@dataclass(frozen=True)
class Attempts:
    """The replies to all questions, with the sums of their core iterations and FLOPs."""

    replies: list[Attempt]
    core_iterations: int
    flops: int

    def cell(self, mode: str, label: str, num_steps: int, at_most: float = math.inf) -> Cell:
        """Return the means over the questions. A trace of at most `at_most` tokens counts as within its budget."""
        n = len(self.replies)
        accuracy = sum(reply.correct for reply in self.replies) / n
        return Cell(
            mode=mode,
            label=label,
            num_steps=num_steps,
            accuracy=accuracy,
            stderr=math.sqrt(accuracy * (1 - accuracy) / n),
            n=n,
            thinking_tokens=sum(reply.thinking_tokens for reply in self.replies) / n,
            new_tokens=sum(reply.new_tokens for reply in self.replies) / n,
            core_iterations=self.core_iterations / n,
            flops=self.flops / n,
            within_budget=sum(reply.thinking_tokens <= at_most for reply in self.replies) / n,
        )


@dataclass(frozen=True)
class Examiner:
    """Ask a model a set of questions and grade its replies.

    Args:
        answer_tokens: most tokens of an answer, delimiters included.
        batch_size: questions decoded together.
    """

    model: DecodableModel
    formatter: Formatter
    questions: Sequence[Question]
    grade: Grade
    answer_tokens: int = 32
    batch_size: int = 32

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self.model)

    def __post_init__(self) -> None:
        if not self.questions:
            raise DataError("there are no questions; give a file with the fields question and answer")

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
        """Ask every question once.

        Args:
            num_steps: core iterations of every token.
            at_most: most thinking tokens.
            waits: ends of thinking to replace by "Wait", within the budget.
            forced: end the thinking at `at_most`; otherwise only the block size of the model limits it.
            hint: text added to the question, for example a budget that the model may ignore.
            temperature: temperature of sampling; 0 takes the most probable token.
            seed: seed of sampling.
        """
        prompts = [self.formatter.prompt(_with_hint(question.text, hint)) for question in self.questions]
        room = self._room(prompts)
        if forced and at_most > room:
            raise ValueError(
                f"thinking_tokens is {at_most}, but the model's block has room for {room} thinking tokens after the "
                "longest prompt; lower thinking_tokens or answer_tokens"
            )
        budget = self.formatter.budget(at_most, waits) if forced else self.formatter.budget(room)
        options = Decoding(
            max_new_tokens=budget.at_most + self._overhead(),
            num_steps=num_steps,
            temperature=temperature,
            seed=seed,
            stop=(self.formatter.end_answer,),
            thinking=budget,
        )
        tokens, core_iterations, flops = self._decode(prompts, options)
        read = [self.formatter.read_reply(ids) for ids in tokens]
        verdicts = self.grade(self.questions, [answer for _, answer in read])
        replies = [
            Attempt(thinking, len(ids), answer, correct)
            for (thinking, answer), ids, correct in zip(read, tokens, verdicts, strict=True)
        ]
        return Attempts(replies, core_iterations, flops)

    def _overhead(self) -> int:
        """Return the number of tokens of a reply without its trace: delimiters and answer."""
        return 1 + len(self.formatter.budget(0).end) + self.answer_tokens

    def _room(self, prompts: list[list[int]]) -> int:
        """Return the number of thinking tokens that fit the model's block after the longest prompt."""
        block, longest = self.model.model_config.block_size, max(map(len, prompts))
        room = block - longest - self._overhead()
        if room < 0:
            raise ValueError(
                f"prompts of up to {longest} tokens and an answer of {self.answer_tokens} do not fit the model's block "
                f"of {block} tokens; lower answer_tokens or give shorter questions"
            )
        return room

    def _decode(self, prompts: list[list[int]], options: Decoding) -> tuple[list[list[int]], int, int]:
        """Decode the prompts sorted by length, to reduce padding; return tokens in the order of the prompts."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        tokens: list[list[int]] = [[] for _ in prompts]
        core_iterations = flops = 0
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            result = self._decoder.generate([prompts[index] for index in batch], options, requests=batch)
            for index, written in zip(batch, result.tokens, strict=True):
                tokens[index] = written
            core_iterations += result.core_iterations
            flops += result.flops
        return tokens, core_iterations, flops


def make_examiner(
    model: DecodableModel, tokenizer: Any, questions: Sequence[Question], config: BudgetsConfig, checker: Checker
) -> Examiner:
    """Return an Examiner that grades by rule (numbers, fractions, LaTeX, letters). Undecided answers count as wrong."""

    def grade(asked: Sequence[Question], answers: Sequence[str]) -> list[bool]:
        pairs = zip(asked, answers, strict=True)
        return [checker.check(question.answer, answer)[0] is True for question, answer in pairs]

    formatter = Formatter(tokenizer, config.format)
    return Examiner(model, formatter, questions, grade, config.answer_tokens, config.batch_size)


def load_questions(config: BudgetsConfig) -> list[Question]:
    """Return the questions of the configured source."""
    assert config.questions is not None
    examples, _ = load_pool([config.questions])
    return [Question(example.question, example.answer) for example in examples]


def budget_label(thinking_tokens: int, waits: int) -> str:
    """Return the budget as written in the column `budget`."""
    return f"tokens={thinking_tokens} waits={waits}"


def _with_hint(question: str, hint: str) -> str:
    return f"{question} {hint}" if hint else question
