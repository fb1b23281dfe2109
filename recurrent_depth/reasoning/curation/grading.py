"""Grade answers against the reference: by rule (the library math-verify), or by a model as judge."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from recurrent_depth.checks import check_positive, one_section
from recurrent_depth.reasoning.curation.answers import Checker
from recurrent_depth.reasoning.curation.stages import Context, Outcome, Stage, needed_version, stage
from recurrent_depth.reasoning.curation.writers import WriterConfig, ask, check_prompt, fill
from recurrent_depth.reasoning.pool import Example


@dataclass(frozen=True)
class Item:
    """An attempt at a question, and the reference answer."""

    question: str
    reference: str
    attempt: str


@dataclass(frozen=True)
class Verdict:
    """The result of grading one attempt.

    Attributes:
        correct: None if the grader could not decide.
        note: why, or what a judge said.
    """

    correct: bool | None
    note: str = ""


class Grader(Protocol):
    """Grades attempts: by rule, or by a judge."""

    def fingerprint(self) -> Any:
        """Return plain JSON that changes when verdicts may change."""

    def grade(self, items: Sequence[Item], context: Context) -> list[Verdict]:
        """Return one verdict per item."""


@dataclass(frozen=True)
class RuleGrader:
    """Compares numbers, fractions, LaTeX and letters of multiple choice.

    Args:
        timeout_s: seconds after which a comparison is stopped; its verdict is None.
    """

    timeout_s: float = 5.0

    def __post_init__(self) -> None:
        check_positive("timeout_s", self.timeout_s)

    def fingerprint(self) -> Any:
        return ["rule", asdict(self), needed_version("math_verify", "math-verify")]

    def grade(self, items: Sequence[Item], context: Context | None = None) -> list[Verdict]:
        with Checker(self.timeout_s) as checker:
            return [Verdict(*checker.check(item.reference, item.attempt)) for item in items]


@dataclass(frozen=True)
class JudgeGrader:
    """A model that reads question, attempt and reference, and ends with Yes or No on its last line.

    Any other last line gives no verdict (None), which is counted.

    Args:
        writer: the model.
        prompt: text sent to the model; `{question}`, `{attempt}` and `{reference}` are replaced.
    """

    writer: WriterConfig
    prompt: str = (
        "Below are a question, an attempt at it and the reference answer. Does the attempt reach the reference answer? "
        "Reason briefly, then write Yes or No alone on the last line.\n\n"
        "Question: {question}\n\nAttempt: {attempt}\n\nReference answer: {reference}"
    )

    def __post_init__(self) -> None:
        check_prompt(self.prompt, "question", "attempt", "reference")

    def fingerprint(self) -> Any:
        return ["judge", self.prompt, self.writer.fingerprint()]

    def grade(self, items: Sequence[Item], context: Context) -> list[Verdict]:
        prompts = [fill(self.prompt, **asdict(item)) for item in items]
        return [_verdict(reply.text, reply.error) for reply in ask(self.writer, prompts, context)]


def _verdict(text: str, error: str | None) -> Verdict:
    if error is not None:
        return Verdict(None, f"judge failed: {error}")
    lines = [line for line in text.splitlines() if line.strip()]
    last = lines[-1].strip(" \t*.!\"'`").lower() if lines else ""
    if last not in ("yes", "no"):
        return Verdict(None, f"judge said {lines[-1][:80]!r}" if lines else "judge said nothing")
    return Verdict(last == "yes")


@dataclass(frozen=True)
class GraderConfig:
    """How attempts are graded; exactly one section is given.

    Args:
        rule: by comparing answers, as {rule: {}}.
        judge: by a model, as {judge: {writer: {local: {model: DIR}}}}.
    """

    rule: RuleGrader | None = None
    judge: JudgeGrader | None = None

    def __post_init__(self) -> None:
        one_section(self)

    @property
    def chosen(self) -> Grader:
        """The grader that is given."""
        return one_section(self)[1]


@stage("grade_traces")
@dataclass(frozen=True)
class GradeTraces(Stage):
    """Set `trace_correct`: whether the answer of a trace (`trace_answer`) agrees with the reference.

    Args:
        grader: how answers are graded.
        drop_wrong: drop rows whose trace is wrong.
    """

    grader: GraderConfig = field(default_factory=lambda: GraderConfig(rule=RuleGrader()))
    drop_wrong: bool = False

    def inputs(self, context: Context) -> list[Any]:
        return [self.grader.chosen.fingerprint()]

    def apply(self, examples: list[Example], context: Context) -> Outcome:
        known = [example for example in examples if example.trace_answer is not None]
        items = [Item(e.question, e.answer, e.trace_answer or "") for e in known]
        verdicts = dict(zip((e.id for e in known), self.grader.chosen.grade(items, context), strict=True))
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
    """Return the numbers of correct, wrong and undecided attempts."""
    names = {True: "correct", False: "wrong", None: "undecided"}
    return {name: sum(verdict.correct is value for verdict in verdicts) for value, name in names.items()}
