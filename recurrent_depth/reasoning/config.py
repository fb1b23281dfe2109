"""Options of `recurrent-depth curate` and `recurrent-depth prepare-reasoning`. Imports no torch.

The options of a curation stage are defined with the stage.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from recurrent_depth.checks import check_at_least, check_between, check_not_empty
from recurrent_depth.data import chat

AnswerFormat = Literal["plain", "gsm8k"]
REQUIRED = ("question", "answer")
OPTIONAL = ("id", "source", "trace", "trace_answer", "trace_correct", "domain")


@dataclass(frozen=True)
class SourceConfig:
    """Where rows come from.

    Args:
        path: a file (.jsonl, .parquet), a folder of them, or the name of a Hugging Face data set, NAME or NAME:SUBSET.
        name: of the source; null takes the path's last part. A field `source` of a row takes precedence.
        split: of a data set.
        fields: the source's field of each column, as {trace: traces.0.text}; a dot goes inside lists and objects.
            Columns not named keep their name. The questions of an evaluation set need `question` alone.
        answer_format: `gsm8k` splits its field `answer` into the trace and the final answer after `####`.
        keep_calculator_marks: keep the marks `<<48/2=24>>` of gsm8k.
        limit: rows to read; null reads all.
    """

    path: str
    name: str | None = None
    split: str = "train"
    fields: dict[str, str] = field(default_factory=dict)
    answer_format: AnswerFormat = "plain"
    keep_calculator_marks: bool = False
    limit: int | None = None

    def __post_init__(self) -> None:
        check_not_empty("path", self.path, "questions.jsonl")
        unknown = sorted(set(self.fields) - {*REQUIRED, *OPTIONAL})
        if unknown:
            raise ValueError(f"fields of {self.path} names {unknown}; columns are {', '.join(REQUIRED + OPTIONAL)}")
        if self.answer_format not in ("plain", "gsm8k"):
            raise ValueError(f"answer_format is {self.answer_format!r}; it must be plain or gsm8k")
        check_at_least("limit", self.limit, 1)

    @property
    def label(self) -> str:
        """The name in ids, and in the column `source` of rows that bring none."""
        return self.name or Path(self.path.partition(":")[0]).stem


@dataclass(frozen=True)
class ThinkingFormat:
    """The words around question, trace and answer.

    Args:
        prompt: text before the reply; {question} is the trimmed question.
        begin_think, end_think: delimiters of the trace.
        begin_answer, end_answer: delimiters of the answer.
        answer_prefix: text before the answer, for example "Answer: ".
        end_turn: text after the reply.
        wait: text that replaces the end of thinking, so that the model continues thinking.
    """

    prompt: str = chat.PROMPT
    begin_think: str = chat.THINK_TOKENS[0]
    end_think: str = chat.THINK_TOKENS[1]
    begin_answer: str = chat.THINK_TOKENS[2]
    end_answer: str = chat.THINK_TOKENS[3]
    answer_prefix: str = ""
    end_turn: str = chat.END_TURN
    wait: str = "Wait"

    def __post_init__(self) -> None:
        if self.prompt.count("{question}") != 1:
            raise ValueError(f"prompt is {self.prompt!r}; it must hold {{question}} once")
        for name in ("begin_think", "end_think", "begin_answer", "end_answer"):
            check_not_empty(name, getattr(self, name), f"<|{name}|>")
        if len(set(self.delimiters)) < len(self.delimiters):
            raise ValueError(
                f"begin_think, end_think, begin_answer and end_answer are {', '.join(map(repr, self.delimiters))}; "
                "they must all be different"
            )

    @property
    def delimiters(self) -> tuple[str, str, str, str]:
        return self.begin_think, self.end_think, self.begin_answer, self.end_answer

    def prompt_text(self, question: str) -> str:
        """Return the prompt of a question."""
        return self.prompt.replace("{question}", question.strip())

    def reply_parts(self, trace: str, answer: str) -> tuple[str, str, str]:
        """Return the reply in three parts: up to the trace, the trace, and the rest."""
        closing = f"{self.end_think}{self.begin_answer}{self.answer_prefix}{answer.strip()}{self.end_answer}"
        return self.begin_think, trace.strip(), closing + self.end_turn


WhenTooLong = Literal["refuse", "drop", "cut"]


@dataclass(frozen=True)
class ReasoningDataConfig:
    """Turn questions with traces and answers into rows for `recurrent-depth train`.

    Args:
        out: folder to write; it gets train/, validation/, tokenizer.json and manifest.json.
        rows: where the examples come from: what `recurrent-depth curate` wrote, or any JSONL, parquet or data set, as
            {path: curated/examples.parquet}.
        tokenizer: a tokenizer.json, or a folder that holds one (a run, an export).
        format: the words around question, trace and answer.
        block: most tokens of an example.
        when_too_long: an example longer than the block is an error (`refuse`), left out (`drop`), or loses the end
            of its trace (`cut`).
        pack: several examples per row, which do not see each other; without it one padded example per row.
        unlearned: a text in a trace that carries no loss, because it is forced at test time and the model should not
            write it by itself, for example Wait.
        validation_share: share of the examples held out, chosen by a hash of the question; at least one.
    """

    out: str
    rows: list[SourceConfig]
    tokenizer: str
    format: ThinkingFormat = field(default_factory=ThinkingFormat)
    block: int = 4096
    when_too_long: WhenTooLong = "refuse"
    pack: bool = True
    unlearned: list[str] = field(default_factory=list, metadata={"literal": True})
    validation_share: float = 0.03

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("rows is empty; name a source, for example --rows '{path: curated/examples.parquet}'")
        check_not_empty("out", self.out, "--out data/reasoning")
        check_at_least("block", self.block, 8)
        check_between("validation_share", self.validation_share, 0, 1, low_open=True, high_open=True)


def stage_name(description: dict[str, Any]) -> str:
    """Return what a recipe calls a stage: its `name`, or its kind."""
    return str(description.get("name", description.get("stage")))


@dataclass(frozen=True)
class CurateConfig:
    """Make a small reasoning set from a pool.

    A killed run continues; a changed recipe repeats only the stages that the change touches.

    Args:
        out: folder; it gets examples.parquet, dropped.parquet, manifest.json, report.md and report.html.
        pool: where rows come from, as {path: train.jsonl, answer_format: gsm8k}.
        stages: the stages in order, each as {stage: quality, option: value}; `name` tells two of one kind apart.
        seed: number that fixes every random choice.
        root: folder of relative data paths.
        cache: folder of stage outputs and answers of models; null takes OUT/cache. Recipes that share it share work.
        imports: modules that register your own stages or filters, for example my_stages.
        title: title of the report.
        note: a sentence in the report, for example the licence of the data.
    """

    out: str
    pool: list[SourceConfig]
    stages: list[dict[str, Any]] = field(default_factory=list)
    seed: int = 0
    root: str = "."
    cache: str | None = None
    imports: list[str] = field(default_factory=list)
    title: str = "A reasoning set"
    note: str = ""

    def __post_init__(self) -> None:
        if not self.pool:
            raise ValueError("pool is empty; name a source, for example --pool '{path: train.jsonl}'")
        check_not_empty("out", self.out, "--out curated")
        check_at_least("seed", self.seed, 0)
        for place, description in enumerate(self.stages):
            if "stage" not in description:
                raise ValueError(f"stages[{place}] is {description}; it must name its kind, as {{stage: quality}}")
        names = [stage_name(description) for description in self.stages]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ValueError(f"stages: two are called {twice[0]!r}; give one of them a `name`")
