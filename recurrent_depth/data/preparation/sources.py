"""Where documents come from: files, folders, Hugging Face data sets, and the Python standard library.

A source is cut into parts once, before any work: a part is a list of slices (whole text files, byte ranges of JSONL,
row groups of parquet, shards of a data set) and is read by one task, at any number of workers.
"""

import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recurrent_depth.data import records
from recurrent_depth.data.config import SourceConfig
from recurrent_depth.data.layout import DataError
from recurrent_depth.data.preparation.documents import Document, FieldError, document_from

STDLIB = "python-stdlib"
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Slice:
    """A piece of a file or data set.

    Attributes:
        address: file, or name of a data set.
        first, stop: bytes of JSONL, row groups of parquet, or shards of a data set; a text file is read whole.
        stamp: size and time of change of a file, so that a changed one is noticed.
    """

    address: str
    first: int = 0
    stop: int = 0
    stamp: tuple[int, int] = (0, 0)


def cut(source: SourceConfig, part_bytes: int) -> list[list[Slice]]:
    """Return the parts of a source, in order: each about `part_bytes` of files, or one shard of a data set.

    Raises:
        FileNotFoundError: if there is no such file.
        DataError: if a folder holds no text, a file is damaged, or a data set cannot be opened.
    """
    files = _files(source.address)
    if files is None:
        shards = _open_hub(source).num_shards
        return [[Slice(source.address, shard, shard + 1)] for shard in range(shards)]
    parts: list[list[Slice]] = [[]]
    filled = 0
    for piece, size in (piece for file in files for piece in _slices(file, part_bytes)):
        if parts[-1] and filled + size > part_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(piece)
        filled += size
    return parts


def skipped_files(source: SourceConfig) -> Counter[str]:
    """Return how many files of a folder are not read because of their ending, by ending."""
    folder = Path(source.address)
    return records.skipped_files(folder, SUFFIXES) if folder.is_dir() else Counter()


def read(source: SourceConfig, part: Iterable[Slice]) -> Iterator[Document]:
    """Yield the documents of one part, in a fixed order.

    Raises:
        DataError: naming file, line and field.
    """
    for piece in part:
        path = Path(piece.address)
        if path.suffix == ".jsonl":
            for offset, record in records.read_jsonl(path, piece.first, piece.stop):
                yield _document(source, record, path, offset)
        elif path.suffix == ".parquet":
            yield from _read_parquet(source, path, piece)
        elif path.is_file():
            yield _read_text(source, path)
        else:
            data = _open_hub(source)
            shard = data.shard(num_shards=data.num_shards, index=piece.first)
            for record in records.read_hub(shard, source.address):
                yield _document(source, record)


def read_documents(address: str, field: str = "text") -> Iterator[Document]:
    """Yield all documents at an address."""
    source = SourceConfig(name=address, address=address, fields=[field])
    for part in cut(source, part_bytes=2**30):
        yield from read(source, part)


def _files(address: str) -> list[Path] | None:
    """Return the files of a local source; None for a data set."""
    if address != STDLIB:
        return records.local_files(address, SUFFIXES)
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "lib2to3", "idlelib"}
    return [file for file in sorted(root.rglob("*.py")) if not skipped.intersection(file.relative_to(root).parts)]


def _slices(file: Path, part_bytes: int) -> Iterator[tuple[Slice, int]]:
    """Yield the slices of a file, each with its size in bytes."""
    status = file.stat()
    stamp = (status.st_size, status.st_mtime_ns)
    if file.suffix == ".jsonl":
        for first in range(0, status.st_size, part_bytes):
            stop = min(first + part_bytes, status.st_size)
            yield Slice(str(file), first, stop, stamp), stop - first
    elif file.suffix == ".parquet":
        for group, size in enumerate(records.parquet_groups(file)):
            yield Slice(str(file), group, group + 1, stamp), size
    else:
        yield Slice(str(file), stamp=stamp), status.st_size


def _read_text(source: SourceConfig, file: Path) -> Document:
    root = Path(sysconfig.get_path("stdlib")) if source.address == STDLIB else file.parent
    text = file.read_text(encoding="utf-8", errors="replace")
    return Document(text, file.relative_to(root).as_posix(), not_utf8="\ufffd" in text and not _is_utf8(file))


def _is_utf8(file: Path) -> bool:
    try:
        file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _read_parquet(source: SourceConfig, file: Path, piece: Slice) -> Iterator[Document]:
    wanted = {name for choice in source.fields for name in choice.split("/")}
    names = sorted(wanted & set(records.parquet_columns(file)))
    if not names:
        columns = records.parquet_columns(file)
        raise _wrong_fields(source, str(file), f"none of the fields {source.fields} is a column (it has {columns})")
    for record in records.read_parquet(file, range(piece.first, piece.stop), names):
        yield _document(source, record, file)


def _document(source: SourceConfig, record: records.Record, file: Path | None = None, offset: int = 0) -> Document:
    try:
        origin = file.name if file else source.address
        return document_from(record, source.fields, source.chat_formatted, origin)
    except FieldError as error:
        line = f", line {records.line_number(file, offset)}" if file and file.suffix == ".jsonl" else ""
        raise _wrong_fields(source, f"{file or source.address}{line}", error) from error


def _wrong_fields(source: SourceConfig, where: str, error: object) -> DataError:
    return DataError(f"source {source.name}: {where}: {error}; name the right one with --field or in fields:")


def _open_hub(source: SourceConfig) -> Any:
    try:
        return records.open_hub(source.address, source.split, source.subset, source.revision)
    except DataError as error:
        raise type(error)(f"source {source.name}: {error}") from error
