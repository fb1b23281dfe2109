"""Records of JSONL files, parquet files and Hugging Face data sets, as dictionaries.

Preparation and curation read their input here. Files are not trusted: for any content, the error names the file and
the line.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recurrent_depth.data.layout import DataError, ResumableError

Record = dict[str, Any]


def local_files(address: str, suffixes: Sequence[str], root: Path = Path()) -> list[Path] | None:
    """Return the files at an address: a file, or the files of a folder that end in one of `suffixes`, in order.

    Returns None if the address may be the name of a Hugging Face data set.

    Raises:
        FileNotFoundError: if the address looks like a path and nothing is there.
        DataError: if the folder holds no such file.
    """
    path = root / address
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [file for file in _files_below(path) if file.suffix in suffixes and file.is_file()]
        if not found:
            others = describe_counts(skipped_files(path, suffixes)) or "no files"
            raise DataError(f"{path} holds no file that ends in {', '.join(suffixes)} (it holds {others})")
        return sorted(found)
    if path.suffix in suffixes or Path(address).is_absolute() or address.startswith("."):
        where = "" if root == Path() else ", or --root, the folder of relative paths"
        raise FileNotFoundError(f"{path} does not exist; fix the path{where}")
    return None


def skipped_files(folder: Path, suffixes: Sequence[str]) -> Counter[str]:
    """Return how many files of a folder have another ending than `suffixes`, by ending. Hidden files do not count."""
    visible = (file for file in _files_below(folder) if not any(p[0] == "." for p in file.relative_to(folder).parts))
    return Counter(file.suffix or "no ending" for file in visible if file.suffix not in suffixes)


def describe_counts(counts: Mapping[str, int], most: int = 4) -> str:
    """Return `480 .rst, 20 .py, ...`, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    listed = [f"{count:,} {name}" for name, count in ordered[:most]]
    return ", ".join([*listed, "..."] if len(counts) > most else listed)


def _files_below(folder: Path) -> Iterator[Path]:
    return (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)


def read_jsonl(file: Path, first: int = 0, stop: int | None = None) -> Iterator[tuple[int, Record]]:
    """Yield the objects of the lines that begin in a byte range, each with the offset of its line. Skips blank lines.

    Raises:
        DataError: if a line is not a JSON object.
    """
    with file.open("rb") as lines:
        if first:
            lines.seek(first - 1)
            lines.readline()
        while stop is None or lines.tell() < stop:
            start, line = lines.tell(), lines.readline()
            if not line:
                return
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
                raise DataError(f"{file}, line {line_number(file, start)} is not JSON ({error})") from error
            if not isinstance(record, dict):
                raise DataError(f"{file}, line {line_number(file, start)} is not an object; write {{...}} on each line")
            yield start, record


def line_number(file: Path, offset: int) -> int:
    """Return the number of the line that begins at a byte offset, counted from 1."""
    with file.open("rb") as content:
        return 1 + content.read(offset).count(b"\n")


def read_parquet(
    file: Path, groups: Sequence[int] | None = None, columns: Sequence[str] | None = None
) -> Iterator[Record]:
    """Yield the rows of a parquet file, or of some of its row groups and columns.

    Raises:
        DataError: if the file is cut or damaged.
    """
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=256, row_groups=groups, columns=columns):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise _not_parquet(file, error) from error


def parquet_columns(file: Path) -> list[str]:
    """Return the names of the columns of a parquet file."""
    return _metadata(file).schema.to_arrow_schema().names


def parquet_groups(file: Path) -> list[int]:
    """Return the size in bytes of each row group of a parquet file."""
    metadata = _metadata(file)
    return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]


def _metadata(file: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise _not_parquet(file, error) from error


def _not_parquet(file: Path, error: Exception) -> DataError:
    return DataError(f"{file} cannot be read as parquet ({error}); restore the file or leave it out")


def read_records(file: Path) -> Iterator[Record]:
    """Yield the records of a .jsonl or .parquet file."""
    if file.suffix == ".parquet":
        yield from read_parquet(file)
    else:
        yield from (record for _, record in read_jsonl(file))


def open_hub(address: str, split: str, subset: str | None = None, revision: str | None = None) -> Any:
    """Return a split of a Hugging Face data set, NAME or NAME:SUBSET, as a stream.

    Raises:
        DataError: if the package `datasets` is missing.
        ResumableError: if the data set cannot be opened.
    """
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise DataError(
            f"{address} is neither a file nor a folder; to read it as a Hugging Face data set, run "
            "pip install 'recurrent-depth[data]'"
        ) from error
    name, _, suffix = address.partition(":")
    try:
        return load_dataset(name, subset or suffix or None, split=split, revision=revision, streaming=True)
    except Exception as error:  # the library raises dozens of types, including those of its HTTP clients
        raise ResumableError(
            f"the data set {address} cannot be opened ({type(error).__name__}: {error}); fix its name, subset or "
            "split, log in if it is gated, or give the path of a local copy"
        ) from error


def read_hub(data: Any, address: str) -> Iterator[Record]:
    """Yield the records of an open data set.

    Raises:
        ResumableError: if the connection is lost.
    """
    try:
        yield from data
    except Exception as error:  # as above
        raise ResumableError(
            f"the data set {address} broke off ({type(error).__name__}: {error}); run the same command again"
        ) from error


def without_surrogates(text: str) -> str:
    """Return the text with `?` for halves of surrogate pairs, which JSON may hold and UTF-8 may not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text
