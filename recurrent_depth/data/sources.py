"""Where documents come from: files, folders, Hugging Face data sets, and the Python standard library.

A source is cut into parts once, before any work: a part is a list of slices (whole text files, byte ranges of JSONL,
row groups of parquet, shards of a data set) and is read by one task, whatever the number of workers.
"""

import json
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recurrent_depth.data.config import SourceConfig
from recurrent_depth.data.documents import Document, FieldError, document_from
from recurrent_depth.data.layout import DataError

STDLIB = "python-stdlib"
_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Slice:
    """A piece of a file or data set.

    Attributes:
        address: file, or name of a data set.
        first, stop: bytes of JSONL, row groups of parquet, or shards of a data set; a text file is taken whole.
        stamp: size and time of change of a file, so that a changed one is noticed.
    """

    address: str
    first: int = 0
    stop: int = 0
    stamp: tuple[int, int] = (0, 0)


def cut(source: SourceConfig, part_bytes: int) -> list[list[Slice]]:
    """The parts of a source, in order: each about `part_bytes` of files, or one shard of a data set.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: a folder without text, a damaged file, a data set that cannot be opened.
    """
    files = _files(source.address)
    if files is None:
        return [[piece] for piece in _shards(source)]
    parts: list[list[Slice]] = [[]]
    filled = 0
    for piece, size in (piece for file in files for piece in _slices(file, part_bytes)):
        if parts[-1] and filled + size > part_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(piece)
        filled += size
    return parts


def read(source: SourceConfig, part: Iterable[Slice]) -> Iterator[Document]:
    """The documents of one part, in a fixed order.

    Raises:
        DataError: naming file, line and field.
    """
    for piece in part:
        path = Path(piece.address)
        if path.suffix == ".jsonl":
            yield from _read_jsonl(source, path, piece)
        elif path.suffix == ".parquet":
            yield from _read_parquet(source, path, piece)
        elif path.is_file():
            root = Path(sysconfig.get_path("stdlib")) if source.address == STDLIB else path.parent
            yield Document(path.read_text(encoding="utf-8", errors="replace"), path.relative_to(root).as_posix())
        else:
            yield from _read_shard(source, piece)


def read_documents(address: str, field: str = "text") -> Iterator[Document]:
    """All documents at an address."""
    source = SourceConfig(name=address, address=address, fields=[field])
    for part in cut(source, part_bytes=2**30):
        yield from read(source, part)


def _files(address: str) -> list[Path] | None:
    """The files of a local source; None for a data set."""
    path = Path(address)
    if address == STDLIB:
        return _standard_library()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES)
        if not files:
            raise DataError(f"{path} holds no file that ends in {', '.join(_SUFFIXES)}")
        return files
    if path.is_file():
        return [path]
    if path.suffix in _SUFFIXES or path.is_absolute() or address.startswith("."):
        raise FileNotFoundError(f"{address} does not exist; mend the path")
    return None


def _standard_library() -> list[Path]:
    """Sources of the user's own Python, without its tests and third-party packages."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "lib2to3", "idlelib"}
    files = sorted(root.rglob("*.py"))
    return [file for file in files if not skipped.intersection(file.relative_to(root).parts)]


def _slices(file: Path, part_bytes: int) -> Iterator[tuple[Slice, int]]:
    """Slices of a file, each with its size in bytes."""
    status = file.stat()
    stamp = (status.st_size, status.st_mtime_ns)
    if file.suffix == ".jsonl":
        for first in range(0, status.st_size, part_bytes):
            stop = min(first + part_bytes, status.st_size)
            yield Slice(str(file), first, stop, stamp), stop - first
    elif file.suffix == ".parquet":
        with _parquet(file) as table:
            for group in range(table.metadata.num_row_groups):
                yield Slice(str(file), group, group + 1, stamp), table.metadata.row_group(group).total_byte_size
    else:
        yield Slice(str(file), stamp=stamp), status.st_size


def _read_jsonl(source: SourceConfig, file: Path, piece: Slice) -> Iterator[Document]:
    """The lines that begin in a byte range."""
    with file.open("rb") as lines:
        if piece.first:
            lines.seek(piece.first - 1)
            lines.readline()
        while (start := lines.tell()) < piece.stop:
            line = lines.readline()
            try:
                yield document_from(json.loads(line), source.fields, source.chat_formatted, file.name)
            except FieldError as error:
                raise _wrong_fields(source, f"{file}, line {_line_number(file, start)}", error) from error
            except ValueError as error:  # not JSON, or not UTF-8
                raise DataError(f"{file}, line {_line_number(file, start)} is not JSON ({error})") from error


def _line_number(file: Path, offset: int) -> int:
    with file.open("rb") as content:
        return 1 + content.read(offset).count(b"\n")


def _read_parquet(source: SourceConfig, file: Path, piece: Slice) -> Iterator[Document]:
    with _parquet(file) as table:
        names = {name for choice in source.fields for name in choice.split("/")} & set(table.schema_arrow.names)
        try:
            groups = range(piece.first, piece.stop)
            for batch in table.iter_batches(batch_size=256, row_groups=groups, columns=sorted(names) or None):
                for row in batch.to_pylist():
                    yield document_from(row, source.fields, source.chat_formatted, file.name)
        except FieldError as error:
            raise _wrong_fields(source, f"{file} (columns {table.schema_arrow.names})", error) from error
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{file} is not a whole parquet file ({error})") from error


def _parquet(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} is not a whole parquet file ({error})") from error


def _wrong_fields(source: SourceConfig, where: str, error: FieldError) -> DataError:
    return DataError(f"source {source.name}: {where}: {error}; name the right one with --field or in fields:")


def _load(source: SourceConfig) -> Any:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise DataError(
            f"{source.address} is no file; to read it as a Hugging Face data set: pip install 'recurrent-depth[data]'"
        ) from error
    name, _, subset = source.address.partition(":")
    try:
        return load_dataset(
            name, source.subset or subset or None, split=source.split, revision=source.revision, streaming=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"source {source.name}: the data set {source.address} cannot be opened ({type(error).__name__}: {error}); "
            "mend its name, subset or split, log in where it is gated, or put the path of a local copy in address"
        ) from error


def _shards(source: SourceConfig) -> list[Slice]:
    return [Slice(source.address, shard, shard + 1) for shard in range(_load(source).num_shards)]


def _read_shard(source: SourceConfig, piece: Slice) -> Iterator[Document]:
    data = _load(source)
    for row in data.shard(num_shards=data.num_shards, index=piece.first):
        try:
            yield document_from(row, source.fields, source.chat_formatted, source.address)
        except FieldError as error:
            raise _wrong_fields(source, source.address, error) from error
