"""Examples (a question, a reasoning trace, an answer): their columns, and how they are read from several sources."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from recurrent_depth.data.layout import DataError
from recurrent_depth.data.records import (
    Record,
    local_files,
    open_hub,
    parquet_columns,
    read_hub,
    read_parquet,
    read_records,
    without_surrogates,
)
from recurrent_depth.reasoning.config import OPTIONAL, REQUIRED, SourceConfig

EXAMPLES = "examples.parquet"
SUFFIXES = (".jsonl", ".parquet")
_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class Example:
    """One row of a pool. `recurrent-depth curate` writes these columns as parquet.

    Attributes:
        id: unique in the pool.
        source: name of the source it was read from.
        question: as given to a model.
        trace: the reasoning; empty if the pool has none (the stage `teacher` asks for it).
        answer: the reference answer.
        trace_answer: the answer that the trace's author reached, if known.
        trace_correct: whether that agrees with the reference; None if not graded.
        domain: label of the domain; None if not labelled.
        trace_tokens: length of the trace in tokens; None if not measured.
        picked: why the row was selected ("seed", "uniform", "benchmark", "random", "longest"); None without selection.
    """

    id: str
    source: str
    question: str
    trace: str
    answer: str
    trace_answer: str | None = None
    trace_correct: bool | None = None
    domain: str | None = None
    trace_tokens: int | None = None
    picked: str | None = None


SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string(), nullable=False) for name in ("id", "source", "question", "trace", "answer")),
        ("trace_answer", pa.string()),
        ("trace_correct", pa.bool_()),
        ("domain", pa.string()),
        ("trace_tokens", pa.int64()),
        ("picked", pa.string()),
    ]
)
COLUMNS = tuple(field.name for field in fields(Example))


@dataclass(frozen=True)
class Drop:
    """A dropped row, the stage that dropped it, and why.

    Attributes:
        reason: a few words, counted in the report.
        detail: what a reader should see, for example an excerpt.
    """

    example: Example
    stage: str
    reason: str
    detail: str = ""


def load_pool(sources: Sequence[SourceConfig], root: Path = Path()) -> tuple[list[Example], list[Drop]]:
    """Return all rows of all sources, in order, and those that lack a question or an answer.

    Raises:
        DataError: if no row of a source can be used, or an id occurs twice.
    """
    kept: list[Example] = []
    drops: list[Drop] = []
    for source in sources:
        loaded, lacking = _load_source(source, root)
        kept.extend(loaded)
        drops.extend(lacking)
    seen: set[str] = set()
    for example in kept:
        if example.id in seen:
            raise DataError(f"the id {example.id!r} occurs twice; give the sources different names, or do not map id")
        seen.add(example.id)
    return kept, drops


def _load_source(source: SourceConfig, root: Path) -> tuple[list[Example], list[Drop]]:
    kept: list[Example] = []
    drops: list[Drop] = []
    found: set[str] = set()
    for number, record in enumerate(read_source(source, root)):
        found |= record.keys()
        example, fault = _example(source, number, record)
        if fault is None:
            kept.append(example)
        else:
            drops.append(Drop(example, "load", fault))
    if not kept:
        reasons = ", ".join(sorted({drop.reason for drop in drops})) or "no rows"
        raise DataError(
            f"{source.path}: no row can be used ({reasons}); it has the fields {sorted(found)}; fix `fields`"
        )
    return kept, drops


def _example(source: SourceConfig, number: int, record: Mapping[str, Any]) -> tuple[Example, str | None]:
    """Return the row, and what it lacks (None if it is complete)."""
    values = {name: lookup(record, source.fields.get(name, name)) for name in (*REQUIRED, *OPTIONAL)}
    question, answer, trace = (_text(values[name]) for name in ("question", "answer", "trace"))
    fault = next((f"no {name}" for name in REQUIRED if not _text(values[name])), None)
    if fault is None and source.answer_format == "gsm8k":
        trace, answer = split_gsm8k(answer, source.keep_calculator_marks)
        fault = None if answer else "no final answer (####)"
    correct = values["trace_correct"]
    example = Example(
        id=f"{source.label}/{number if values['id'] is None else values['id']}",
        source=_text(values["source"]) or source.label,
        question=question,
        trace=trace,
        answer=answer,
        trace_answer=_text(values["trace_answer"]) or None,
        trace_correct=correct if isinstance(correct, bool) else None,
        domain=_text(values["domain"]) or None,
    )
    return example, fault


def split_gsm8k(answer: str, keep_calculator_marks: bool = False) -> tuple[str, str]:
    """Return trace and final answer of a GSM8K answer; the final answer is empty if `####` is missing."""
    trace, mark, final = answer.rpartition("####")
    if not mark:
        return answer.strip(), ""
    trace = trace if keep_calculator_marks else _CALCULATOR_MARK.sub("", trace)
    return trace.strip(), final.strip()


def lookup(record: Mapping[str, Any], path: str) -> Any:
    """Return the value at `path`: a field, or `field.0.inner` through lists and objects; None if there is none."""
    if path in record:
        return record[path]
    value: Any = record
    for part in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, (list, tuple)) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _text(value: Any) -> str:
    """Return text and numbers as text; anything else counts as missing."""
    if isinstance(value, str):
        return without_surrogates(value).strip()
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else ""


def read_source(source: SourceConfig, root: Path = Path()) -> Iterator[Record]:
    """Yield the records of a source as they are, `limit` at most."""
    return itertools.islice(_all_records(source, root), source.limit)


def source_files(source: SourceConfig, root: Path) -> list[Path]:
    """Return the files of a source; none for the name of a Hugging Face data set."""
    return local_files(source.path, SUFFIXES, root) or []


def _all_records(source: SourceConfig, root: Path) -> Iterator[Record]:
    files = source_files(source, root)
    if not files:
        return read_hub(open_hub(source.path, source.split), source.path)
    return itertools.chain.from_iterable(map(read_records, files))


def to_table(examples: Sequence[Example]) -> pa.Table:
    """Return rows as a table of `SCHEMA`."""
    return pa.Table.from_pylist([asdict(example) for example in examples], schema=SCHEMA)


def read_examples(path: str | Path) -> list[Example]:
    """Return rows written by `recurrent-depth curate`: a parquet file, or the folder that holds examples.parquet."""
    path = Path(path)
    file = path / EXAMPLES if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; run recurrent-depth curate, or fix the path")
    missing = sorted({"id", "source", "question", "trace", "answer"} - set(parquet_columns(file)))
    if missing:
        raise DataError(f"{file} lacks the columns {missing}; it must be one that recurrent-depth curate wrote")
    return [Example(**{name: record[name] for name in COLUMNS if name in record}) for record in read_parquet(file)]
