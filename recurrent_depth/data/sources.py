"""Where documents come from: files, folders, Hugging Face data sets, and the Python standard library."""

import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from recurrent_depth.data.packed import DataError

STDLIB = "python-stdlib"
_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    text: str
    source: str


def read_documents(source: str, field: str = "text") -> Iterator[Document]:
    """The documents of a source, in a fixed order.

    Args:
        source: `python-stdlib`, a file (.txt, .md, .jsonl, .parquet) or a folder of them, or the name of a Hugging Face
            data set, optionally NAME:SUBSET (its train split, streamed).
        field: where JSONL, parquet and data sets keep the text.
    """
    path = Path(source)
    if source == STDLIB:
        yield from _standard_library()
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES)
        if not files:
            raise DataError(f"{path} holds no file that ends in {', '.join(_SUFFIXES)}")
        for file in files:
            yield from _read_file(file, field)
    elif path.is_file():
        yield from _read_file(path, field)
    elif path.suffix in _SUFFIXES or path.is_absolute() or source.startswith("."):
        raise FileNotFoundError(f"{source} does not exist; mend the path")
    else:
        yield from _hub_data_set(source, field)


def _read_file(file: Path, field: str) -> Iterator[Document]:
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if file.suffix in readers:
        for text in readers[file.suffix](file, field):
            yield Document(text, file.name)
    else:
        yield Document(file.read_text(encoding="utf-8", errors="replace"), file.name)


def _read_jsonl(file: Path, field: str) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{file}, line {number} is not JSON ({error})") from error
            yield _field(row, field, f"{file}, line {number}")


def _read_parquet(file: Path, field: str) -> Iterator[str]:
    try:
        batches = pq.ParquetFile(file).iter_batches(batch_size=256)
        for batch in batches:
            for row in batch.to_pylist():
                yield _field(row, field, str(file))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} is not a whole parquet file ({error})") from error


def _field(row: object, field: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        names = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{where}: no text in field {field!r} (found {names}); name the right one with --field")
    return row[field]


def _hub_data_set(name: str, field: str) -> Iterator[Document]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise DataError(f"{name} is no file; to read it as a Hugging Face data set: pip install datasets") from error
    name, _, subset = name.partition(":")
    for row in load_dataset(name, subset or None, split="train", streaming=True):
        yield Document(_field(row, field, name), name)


def _standard_library() -> Iterator[Document]:
    """Sources of the user's own Python, without its tests and third-party packages."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "lib2to3", "idlelib"}
    for file in sorted(root.rglob("*.py")):
        if not skipped.intersection(file.relative_to(root).parts):
            yield Document(file.read_text(encoding="utf-8", errors="replace"), file.relative_to(root).as_posix())
