"""Drop questions that a model solves: they are too easy to teach anything (s1, section 2.2)."""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from recurrent_depth.data.layout import DataError
from recurrent_depth.data.records import line_number, read_jsonl
from recurrent_depth.files import file_hash
from recurrent_depth.reasoning.curation.grading import Grader, GraderConfig, Item, RuleGrader, Verdict, count_verdicts
from recurrent_depth.reasoning.curation.stages import Context, Outcome, Stage, existing, stage
from recurrent_depth.reasoning.curation.writers import WriterConfig, ask, check_prompt, fill
from recurrent_depth.reasoning.pool import Example


@dataclass(frozen=True)
class Attempts:
    """The attempts of one model, made now or recorded.

    Args:
        name: name of the model in the report.
        writer: the model; null for recorded attempts.
        prompt: text sent to the model; `{question}` is replaced.
        recorded: JSONL of {id, attempt}, one line per row of the pool; null asks the writer.
    """

    name: str
    writer: WriterConfig | None = None
    prompt: str = "{question}"
    recorded: str | None = None

    def __post_init__(self) -> None:
        if (self.writer is None) == (self.recorded is None):
            raise ValueError(f"writer, recorded: the attempts of {self.name} need exactly one of them")
        check_prompt(self.prompt, "question")

    def fingerprint(self, context: Context) -> Any:
        if self.writer is not None:
            return [self.name, self.prompt, self.writer.fingerprint()]
        return [self.name, file_hash(existing(self.recorded or "", context.root))]

    def texts(self, examples: list[Example], context: Context) -> list[str | None]:
        """Return one attempt per row; None where there is none."""
        if self.writer is None:
            recorded = self._recorded(context)
            found = [recorded.get(example.id) for example in examples]
            if not any(text is not None for text in found):
                known = ", ".join(list(recorded)[:3]) or "nothing"
                raise DataError(
                    f"{self.recorded} has no attempt at any of the {len(examples)} rows; it has {known}, the pool "
                    f"has {examples[0].id}, ...: the ids must be the same"
                )
            return found
        replies = ask(self.writer, [fill(self.prompt, question=example.question) for example in examples], context)
        return [None if reply.error is not None else reply.text for reply in replies]

    def _recorded(self, context: Context) -> dict[str, str]:
        file = existing(self.recorded or "", context.root)
        attempts = {}
        for offset, record in read_jsonl(file):
            name, attempt = record.get("id"), record.get("attempt")
            if not isinstance(name, str) or not isinstance(attempt, str):
                raise DataError(
                    f"{file}, line {line_number(file, offset)} needs the texts `id` and `attempt`; found "
                    f"{json.dumps(record)[:80]}"
                )
            attempts[name] = attempt
        return attempts


@stage("difficulty")
@dataclass(frozen=True)
class Difficulty(Stage):
    """Let models attempt every question; drop the questions that any of them solves.

    A row that no model is known to have solved is dropped too if an attempt is missing or could not be graded, with
    that reason, unless `keep_unknown`.

    Args:
        models: models whose attempts count.
        grader: how attempts are graded.
        keep_unknown: keep rows of which it is not known whether they were solved.
    """

    models: list[Attempts] = field(default_factory=list)
    grader: GraderConfig = field(default_factory=lambda: GraderConfig(rule=RuleGrader()))
    keep_unknown: bool = False

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"models: their names are {names}; give at least one model, each with another name")

    def inputs(self, context: Context) -> list[Any]:
        return [self.grader.chosen.fingerprint(), *(model.fingerprint(context) for model in self.models)]

    def apply(self, examples: list[Example], context: Context) -> Outcome:
        outcome = Outcome([])
        verdicts: dict[str, list[Verdict | None]] = {}
        for model in self.models:
            texts = model.texts(examples, context)
            verdicts[model.name] = _grade(self.grader.chosen, examples, texts, context)
        for row, example in enumerate(examples):
            reason, detail = self._reason({name: graded[row] for name, graded in verdicts.items()})
            if reason is None:
                outcome.examples.append(example)
            else:
                outcome.drops.append(context.drop(example, reason, detail))
        outcome.facts = {name: _count(graded) for name, graded in verdicts.items()}
        return outcome

    def _reason(self, verdicts: dict[str, Verdict | None]) -> tuple[str | None, str]:
        """Return why the row is dropped (None if it stays), and the detail."""
        solvers = [name for name, verdict in verdicts.items() if verdict is not None and verdict.correct]
        if solvers:
            return f"solved by {solvers[0]}", ", ".join(solvers)
        if self.keep_unknown:
            return None, ""
        for name, verdict in verdicts.items():
            if verdict is None:
                return f"no attempt by {name}", ""
            if verdict.correct is None:
                return f"attempt by {name} not graded", verdict.note
        return None, ""


def _grade(grader: Grader, examples: list[Example], texts: list[str | None], context: Context) -> list[Verdict | None]:
    """Return a verdict per row; None where there is no attempt."""
    attempted = [(e, text) for e, text in zip(examples, texts, strict=True) if text is not None]
    graded = iter(grader.grade([Item(e.question, e.answer, text) for e, text in attempted], context))
    return [None if text is None else next(graded) for text in texts]


def _count(verdicts: list[Verdict | None]) -> dict[str, Any]:
    graded = [verdict for verdict in verdicts if verdict is not None]
    counts: dict[str, Any] = count_verdicts(graded) | {"no attempt": len(verdicts) - len(graded)}
    notes = Counter(verdict.note.partition(":")[0][:40] for verdict in graded if verdict.correct is None)
    return counts | ({"why undecided": dict(notes.most_common(3))} if notes else {})
