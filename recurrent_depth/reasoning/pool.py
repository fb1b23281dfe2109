"""Rows of a question, a reasoning trace and an answer: their columns, and how they are read from several sources."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recurrent_depth.data.packed import DataError
from recurrent_depth.reasoning.config import OPTIONAL, REQUIRED, SourceConfig

_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class Example:
    """One row. `recurrent-depth curate` writes these columns as parquet.

    Attributes:
        id: unique in the pool.
        source: name of the source it came from.
        question: as put to a model.
        trace: the reasoning; empty where the pool has none (see recurrent_depth.reasoning.teacher).
        answer: the reference answer.
        trace_answer: the answer that the trace's author reached, where it is known.
        trace_correct: whether that agrees with the reference; None: not graded.
        domain: label of the domain; None: not labelled.
        trace_tokens: length of the trace in tokens; None: not measured.
        picked: why the row was selected ("seed", "uniform", "benchmark", "random", "longest"); None: no selection.
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
    """A row that left the pool, the stage that dropped it, and why (`reason` is counted, `detail` is for a reader)."""

    example: Example
    stage: str
    reason: str
    detail: str = ""


def load_pool(sources: Sequence[SourceConfig], root: Path = Path()) -> tuple[list[Example], list[Drop]]:
    """All rows of all sources, in order, and those that lack a question or an answer.

    Raises:
        DataError: for a source of which no row can be used, and for ids that occur twice.
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
            raise DataError(f"the id {example.id!r} occurs twice; give sources different names, or map no id")
        seen.add(example.id)
    return kept, drops


def _load_source(source: SourceConfig, root: Path) -> tuple[list[Example], list[Drop]]:
    kept: list[Example] = []
    drops: list[Drop] = []
    found: set[str] = set()
    for number, record in enumerate(read_records(source, root)):
        found |= record.keys()
        example, fault = _example(source, number, record)
        if fault is None:
            kept.append(example)
        else:
            drops.append(Drop(example, "load", fault))
    if not kept:
        reasons = ", ".join(sorted({drop.reason for drop in drops})) or "no rows"
        raise DataError(
            f"{source.path}: no row can be used ({reasons}); it has the fields {sorted(found)}: mend `fields`"
        )
    return kept, drops


def _example(source: SourceConfig, number: int, record: Mapping[str, Any]) -> tuple[Example, str | None]:
    """The row, and what it lacks if it lacks something."""
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
    """(trace, final answer) of a GSM8K answer; the final answer is empty where `####` is missing."""
    trace, mark, final = answer.rpartition("####")
    if not mark:
        return answer.strip(), ""
    trace = trace if keep_calculator_marks else _CALCULATOR_MARK.sub("", trace)
    return trace.strip(), final.strip()


def lookup(record: Mapping[str, Any], path: str) -> Any:
    """The value at `path`: a field, or `field.0.inner` through lists and objects; None where there is none."""
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
    """Text and numbers as text; anything else counts as missing."""
    if isinstance(value, str):
        return value.strip()
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else ""


def read_records(source: SourceConfig, root: Path = Path()) -> Iterator[dict[str, Any]]:
    """The rows of a source as they are, `limit` at most."""
    for number, record in enumerate(_records(source, root)):
        if number == source.limit:
            return
        yield record


def source_files(source: SourceConfig, root: Path) -> list[Path]:
    """The files of a source; none for a data set by name."""
    path = root / source.path
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".jsonl", ".parquet"))
        if not files:
            raise DataError(f"{path} holds no .jsonl or .parquet file")
        return files
    if path.is_file():
        return [path]
    if path.suffix in (".jsonl", ".parquet") or Path(source.path).is_absolute() or source.path.startswith("."):
        raise FileNotFoundError(f"{path} does not exist; mend the path, or --root, the folder of relative paths")
    return []


def _records(source: SourceConfig, root: Path) -> Iterator[dict[str, Any]]:
    files = source_files(source, root)
    if not files:
        yield from _hub_records(source)
    for file in files:
        yield from read_jsonl(file) if file.suffix == ".jsonl" else _parquet_records(file)


def read_jsonl(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; a line that is none is an error that names it."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{file}, line {number} is not JSON ({error})") from error
            if not isinstance(record, dict):
                raise DataError(f"{file}, line {number} is no object; each line must be {{...}}")
            yield record


def _parquet_records(file: Path) -> Iterator[dict[str, Any]]:
    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} is not a whole parquet file ({error})") from error


def _hub_records(source: SourceConfig) -> Iterator[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise DataError(f"{source.path} is no file; for data sets: pip install 'recurrent-depth[curate]'") from error
    name, _, subset = source.path.partition(":")
    yield from load_dataset(name, subset or None, split=source.split, streaming=True)


def to_table(examples: Sequence[Example]) -> pa.Table:
    """Rows as a table of `SCHEMA`."""
    return pa.Table.from_pylist([asdict(example) for example in examples], schema=SCHEMA)


def read_examples(path: str | Path) -> list[Example]:
    """Rows written by `recurrent-depth curate`: a parquet file, or the folder that holds examples.parquet."""
    path = Path(path)
    file = path / "examples.parquet" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; run recurrent-depth curate, or mend the path")
    records = list(_parquet_records(file))
    missing = sorted({"id", "source", "question", "trace", "answer"} - set(pq.read_schema(file).names))
    if missing:
        raise DataError(f"{file} lacks the columns {missing}; it must be one that recurrent-depth curate wrote")
    return [Example(**{name: record[name] for name in COLUMNS if name in record}) for record in records]
