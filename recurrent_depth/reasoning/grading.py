"""Whether an answer agrees with the reference: by rule (the library math-verify), or by a model as judge."""

import multiprocessing
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any, Protocol

from recurrent_depth.data.packed import DataError
from recurrent_depth.reasoning.endpoint import EndpointConfig
from recurrent_depth.reasoning.local import LocalConfig
from recurrent_depth.reasoning.pool import Example
from recurrent_depth.reasoning.stages import Context, Outcome, Stage, stage
from recurrent_depth.reasoning.teacher import ask, check_prompt, fill

_LETTER = re.compile(r"\(?([A-H])\)?\.?")
_LONE_LETTER = re.compile(r"(?<![A-Za-z])\(?([A-H])\)?(?![A-Za-z])")
_LATEX = re.compile(r"[\\^_{}]|[A-Za-z]")
_START_S = 60.0  # of the worker, which imports sympy


@dataclass(frozen=True)
class Item:
    """An attempt at a question, and the reference answer."""

    question: str
    reference: str
    attempt: str


@dataclass(frozen=True)
class Verdict:
    """correct: None where the grader could not tell; `note` says why, or what a judge said."""

    correct: bool | None
    note: str = ""


class Grader(Protocol):
    """Rule or judge: both are asked in the same way."""

    def fingerprint(self) -> Any:
        """Plain JSON that changes when verdicts may change."""

    def grade(self, items: Sequence[Item], context: Context) -> list[Verdict]:
        """One verdict an item."""


@dataclass(frozen=True)
class RuleGrader:
    """Compares numbers, fractions, LaTeX and letters of multiple choice.

    Comparisons run in a process of their own, since computer algebra can take forever on an odd expression.

    Args:
        timeout_s: after which a comparison is given up; the verdict is then None.
    """

    timeout_s: float = 5.0

    def __post_init__(self) -> None:
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s is {self.timeout_s}; it must be positive")

    def fingerprint(self) -> Any:
        from importlib.metadata import version

        return ["rule", asdict(self), version("math-verify")]

    def grade(self, items: Sequence[Item], context: Context | None = None) -> list[Verdict]:
        with AnswerChecker(self.timeout_s) as worker:
            return [worker.compare(item.reference, item.attempt) for item in items]


class AnswerChecker:
    """A process that compares; one that does not answer in time is replaced."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.process: multiprocessing.process.BaseProcess | None = None

    def __enter__(self) -> "AnswerChecker":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def compare(self, reference: str, attempt: str) -> Verdict:
        if not attempt.strip():
            return Verdict(False, "no answer")
        if final_part(attempt) == final_part(reference):
            return Verdict(True)
        if self.process is None:
            self._start()
        self.pipe.send((reference, attempt))
        if not self.pipe.poll(self.timeout_s):
            self._stop()
            return Verdict(None, f"no verdict within {self.timeout_s:g} s")
        try:
            return Verdict(self.pipe.recv())
        except EOFError:
            self._stop()
            return Verdict(None, "the comparison crashed")

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_compare_forever, args=(other,), daemon=True)
        self.process.start()
        other.close()
        if not self.pipe.poll(_START_S) or self.pipe.recv() != "ready":
            self._stop()
            raise DataError("the answer checker did not start; it needs: pip install 'recurrent-depth[curate]'")

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None


def _compare_forever(pipe: Connection) -> None:
    """In the worker: answer each (reference, attempt) with whether they agree."""
    try:
        import math_verify  # noqa: F401
    except ModuleNotFoundError:
        pipe.send("math-verify is missing")
        return
    import logging

    logging.disable(logging.WARNING)  # it warns that timeouts are ours to handle; they are, in the parent
    pipe.send("ready")
    while True:
        try:
            reference, attempt = pipe.recv()
        except EOFError:
            return
        pipe.send(agree(reference, attempt))


def agree(reference: str, attempt: str) -> bool:
    """Whether the final answer of `attempt` equals the reference. No time limit: see `RuleGrader`."""
    from math_verify import verify

    letter = _LETTER.fullmatch(final_part(reference))
    if letter is not None:
        return letter.group(1) == _chosen_letter(final_part(attempt))
    gold = _parsed(final_part(reference))
    return bool(gold) and verify(gold, _parsed(final_part(attempt)), timeout_seconds=None)


def _chosen_letter(text: str) -> str | None:
    """The letter of multiple choice: the whole text, or the first one behind the last "answer" or box."""
    whole = _LETTER.fullmatch(text)
    marks = [mark.end() for mark in re.finditer(r"answer|\\boxed|\\text", text, re.IGNORECASE)]
    chosen = whole or (_LONE_LETTER.search(text, marks[-1]) if marks else None)
    return None if chosen is None else chosen.group(1)


def _parsed(text: str) -> list[Any]:
    """Expressions in a text: as it is, and, where a short text looks like bare LaTeX or algebra, as a formula."""
    from math_verify import parse

    bare = len(text) < 200 and "$" not in text and r"\boxed" not in text and _LATEX.search(text)
    formula = parse(f"${text}$", parsing_timeout=None) if bare else []
    return [*formula, *parse(text, parsing_timeout=None)]


def final_part(text: str) -> str:
    """What follows the last `####` on its line (GSM8K's mark), or the whole text; the library finds boxes itself."""
    _, mark, final = text.rpartition("####")
    return final.strip().split("\n")[0].strip() if mark else text.strip()


@dataclass(frozen=True)
class JudgeGrader:
    """A model that is shown question, attempt and reference, and ends with Yes or No on its last line.

    Any other last line is nonsense: the verdict is None, counted, and never taken for an answer.

    Args:
        judge: the model.
        prompt: `{question}`, `{attempt}` and `{reference}` are replaced.
    """

    judge: EndpointConfig | LocalConfig
    prompt: str = (
        "Below are a question, an attempt at it and the reference answer. Does the attempt reach the reference answer? "
        "Reason briefly, then write Yes or No alone on the last line.\n\n"
        "Question: {question}\n\nAttempt: {attempt}\n\nReference answer: {reference}"
    )

    def __post_init__(self) -> None:
        check_prompt(self.prompt, "question", "attempt", "reference")

    def fingerprint(self) -> Any:
        return ["judge", self.prompt, self.judge.fingerprint()]

    def grade(self, items: Sequence[Item], context: Context) -> list[Verdict]:
        prompts = [fill(self.prompt, **asdict(item)) for item in items]
        return [_verdict(reply.text, reply.error) for reply in ask(self.judge, prompts, context)]


def _verdict(text: str, error: str | None) -> Verdict:
    if error is not None:
        return Verdict(None, f"judge failed: {error}")
    lines = [line for line in text.splitlines() if line.strip()]
    last = lines[-1].strip(" \t*.!\"'`").lower() if lines else ""
    if last not in ("yes", "no"):
        return Verdict(None, f"judge said {lines[-1][:80]!r}" if lines else "judge said nothing")
    return Verdict(last == "yes")


@stage("grade_traces")
@dataclass(frozen=True)
class GradeTraces(Stage):
    """Set `trace_correct`: whether the answer that a trace reached (`trace_answer`) agrees with the reference.

    Args:
        grader: RuleGrader's or JudgeGrader's options.
        drop_wrong: drop rows whose trace is wrong.
    """

    grader: RuleGrader | JudgeGrader = field(default_factory=RuleGrader)
    drop_wrong: bool = False

    def inputs(self, context: Context) -> list[Any]:
        return [self.grader.fingerprint()]

    def apply(self, examples: list[Example], context: Context) -> Outcome:
        known = [example for example in examples if example.trace_answer is not None]
        items = [Item(e.question, e.answer, e.trace_answer or "") for e in known]
        verdicts = dict(zip((e.id for e in known), self.grader.grade(items, context), strict=True))
        outcome = Outcome([])
        for example in examples:
            verdict = verdicts.get(example.id)
            if verdict is None or verdict.correct is not False or not self.drop_wrong:
                correct = example.trace_correct if verdict is None else verdict.correct
                outcome.examples.append(replace(example, trace_correct=correct))
            else:
                outcome.drops.append(context.drop(example, "trace is wrong", f"it says {example.trace_answer!r:.80}"))
        outcome.facts = count_verdicts(list(verdicts.values())) | {"no answer to grade": len(examples) - len(known)}
        return outcome


def count_verdicts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """Correct, wrong, and those a grader could not tell."""
    names = {True: "correct", False: "wrong", None: "undecided"}
    return {name: sum(verdict.correct is value for verdict in verdicts) for value, name in names.items()}
