"""Drop rows that the pool has twice, and rows that an evaluation set has too."""

from dataclasses import dataclass, field
from typing import Any

from recurrent_depth.checks import check_at_least
from recurrent_depth.data.decontamination import NgramIndex, words_of
from recurrent_depth.data.layout import DataError
from recurrent_depth.reasoning.config import SourceConfig
from recurrent_depth.reasoning.curation.stages import Context, Outcome, Stage, source_inputs, stage
from recurrent_depth.reasoning.pool import Example, lookup, read_source


def folded(text: str) -> str:
    """Return a text lower-cased, with white space folded. Texts that are equal in this form count as the same."""
    return " ".join(words_of(text))


@stage("exact_duplicates")
@dataclass(frozen=True)
class ExactDuplicates(Stage):
    """Keep the first of rows whose questions differ only in case and white space."""

    def apply(self, examples: list[Example], context: Context) -> Outcome:
        first: dict[str, str] = {}
        outcome = Outcome([])
        for example in examples:
            keeper = first.setdefault(folded(example.question), example.id)
            if keeper == example.id:
                outcome.examples.append(example)
            else:
                outcome.drops.append(context.drop(example, "duplicate question", f"same as {keeper}"))
        return outcome


@stage("decontaminate")
@dataclass(frozen=True)
class Decontaminate(Stage):
    """Drop questions that share `n` consecutive words with a question of an evaluation set, or are the same as one.

    Args:
        against: evaluation sets, as {path: test.jsonl}; the field `question` of each row is read.
        n: words of an n-gram; 8 is s1's.
    """

    against: list[SourceConfig] = field(default_factory=list)
    n: int = 8

    def __post_init__(self) -> None:
        if not self.against:
            raise ValueError("against is empty; name at least one evaluation set")
        check_at_least("n", self.n, 1)

    def inputs(self, context: Context) -> list[Any]:
        return source_inputs(self.against, context.root)

    def apply(self, examples: list[Example], context: Context) -> Outcome:
        indices = {source.label: _Index(evaluation_questions(source, context), self.n) for source in self.against}
        outcome = Outcome([])
        for example in examples:
            found = ((name, index.overlap(example.question)) for name, index in indices.items())
            name, overlap = next(((name, overlap) for name, overlap in found if overlap), ("", None))
            if overlap is None:
                outcome.examples.append(example)
            else:
                outcome.drops.append(context.drop(example, f"overlaps {name}", overlap))
        outcome.facts = {name: index.facts for name, index in indices.items()}
        return outcome


class _Index:
    """The n-grams of an evaluation set, and its whole questions, of which some may be shorter than n words."""

    def __init__(self, questions: list[str], n: int) -> None:
        self.ngrams = NgramIndex(questions, n)
        self.whole = {folded(question) for question in questions}
        self.facts = {"questions": len(questions), "shorter than n words": self.ngrams.too_short}

    def overlap(self, question: str) -> str | None:
        whole = folded(question)
        return whole if whole in self.whole else self.ngrams.overlap(question)


def evaluation_questions(source: SourceConfig, context: Context) -> list[str]:
    """Return the questions of an evaluation set. A row without one is an error: it could not be looked for."""
    name = source.fields.get("question", "question")
    questions = []
    for number, record in enumerate(read_source(source, context.root)):
        question = lookup(record, name)
        if not isinstance(question, str) or not question.strip():
            raise DataError(
                f"{source.path}, row {number}: no question in field {name!r} (found {sorted(record)}); fix `fields`"
            )
        questions.append(question)
    if not questions:
        raise DataError(f"{source.path} holds no questions; fix the path")
    return questions
