"""Packed rows on disk: parquet files of `input_ids` [T + 1], read by row number.

Optional columns: `labels` [T] (aligned, -100 for none) and `doc_starts` (positions where a document begins).
"""

import hashlib
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from recurrent_depth.data.batch import Batch
from recurrent_depth.data.config import PackedDataConfig
from recurrent_depth.data.layout import MANIFEST, TOKENIZER, DataError, Split

_CACHED_GROUPS = 2  # rows are read in order, so the one in use and the next
HASHED_BYTES = 1 << 30
HASHED_BLOCK = 1 << 16


class PackedSource:
    """Rows of parquet files in a seeded order.

    Every epoch permutes the row groups of all files, and the rows within each: sequential reading touches one row
    group at a time, and every row comes exactly once per epoch, at any number of ranks.
    """

    def __init__(self, config: PackedDataConfig, split: Split, seed: int) -> None:
        self.config, self.seed = config, seed
        self.folder = _folder(config, split)
        self.name = config.path
        self.files = sorted(self.folder.glob("*.parquet"))
        if not self.files:
            raise DataError(f"{self.folder} holds no parquet files; run recurrent-depth prepare --out {config.path}")
        self.groups = [(file, group, rows) for file in self.files for group, rows in _row_groups(file) if rows]
        self.rows_per_epoch = sum(rows for _, _, rows in self.groups)
        if not self.rows_per_epoch:
            raise DataError(f"{self.folder} holds no rows; prepare more text or shorter rows")
        self.cache: OrderedDict[tuple[Path, int], dict[str, Any]] = OrderedDict()
        first = _columns(*self.groups[0][:2])
        self.sequence_length = first["input_ids"].shape[1] - 1
        self.manifest = read_manifest(self.folder)
        if self.manifest is not None:
            _check_manifest(self.manifest, self.folder, self.rows_per_epoch, self.sequence_length)
        self.vocab_size = self.manifest["vocab_size"] if self.manifest else int(first["input_ids"].max()) + 1
        self.has_labels = "labels" in first
        self.order: tuple[int, np.ndarray, np.ndarray] | None = None
        self.shuffled: tuple[int, int, np.ndarray] | None = None
        if config.document_masking and "doc_starts" not in first:
            raise DataError(f"{self.files[0]} has no column doc_starts; set data.packed.document_masking to false")

    def fingerprint(self) -> str:
        """Return a hash of the files.

        Up to 1 GiB every byte counts. Of a larger set, the sizes of all files and blocks of 64 KiB at even distances,
        1 GiB in all, with the beginning and the end of every file (where parquet keeps the statistics and the place of
        every column): a change that moves no byte outside these blocks is not noticed.
        """
        digest = hashlib.sha256()
        for file in self.files:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as content:
                for start, length in _hashed_parts(size, HASHED_BYTES // len(self.files)):
                    content.seek(start)
                    digest.update(content.read(length))
        return digest.hexdigest()[:16]

    def tokenizer_json(self) -> str | None:
        """Return the tokenizer beside the rows. One that is not the manifest's is an error."""
        candidates = [self.folder / TOKENIZER, self.folder.parent / TOKENIZER]
        file = next((file for file in candidates if file.is_file()), None)
        if file is None:
            return None
        content = file.read_bytes()
        if self.manifest and hashlib.sha256(content).hexdigest() != self.manifest.get("tokenizer_sha256"):
            raise DataError(
                f"{file} is not the tokenizer the rows were made with; restore it or prepare the data again"
            )
        return content.decode()

    def batch(self, first_row: int, count: int, step: int) -> Batch:
        rows = [self._row(number) for number in range(first_row, first_row + count)]
        ids = torch.from_numpy(np.stack([row["input_ids"] for row in rows]).astype(np.int64))
        targets = ids[:, 1:]
        if self.has_labels:
            targets = torch.from_numpy(np.stack([row["labels"] for row in rows]).astype(np.int64))
        documents = positions = None
        if self.config.document_masking:
            documents, positions = _documents([row["doc_starts"] for row in rows], ids.shape[1] - 1)
        return Batch(ids[:, :-1], targets, documents, positions if self.config.restart_positions else None)

    def _row(self, number: int) -> dict[str, Any]:
        epoch, offset = divmod(number, self.rows_per_epoch)
        order, ends = self._order(epoch)
        place = int(np.searchsorted(ends, offset, side="right"))
        number_of_group = int(order[place])
        file, group, rows = self.groups[number_of_group]
        row = self._order_within(epoch, number_of_group)[offset - (int(ends[place]) - rows)]
        return {name: column[row] for name, column in self._read_group(file, group).items()}

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the row groups in the order of this epoch, and the row number at which each ends."""
        if self.order is None or self.order[0] != epoch:
            order = self._generator(epoch, 0).permutation(len(self.groups))
            ends = np.cumsum([self.groups[index][2] for index in order])
            self.order = (epoch, order, ends)
        return self.order[1], self.order[2]

    def _order_within(self, epoch: int, group: int) -> np.ndarray:
        """Return the rows of a row group in the order of this epoch."""
        if self.shuffled is None or self.shuffled[:2] != (epoch, group):
            self.shuffled = (epoch, group, self._generator(epoch, group + 1).permutation(self.groups[group][2]))
        return self.shuffled[2]

    def _generator(self, epoch: int, what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, what])

    def _read_group(self, file: Path, group: int) -> dict[str, Any]:
        key = (file, group)
        if key not in self.cache:
            columns = _columns(file, group)
            self._check_group(columns, f"{file}, row group {group}")
            self.cache[key] = columns
            if len(self.cache) > _CACHED_GROUPS:
                self.cache.popitem(last=False)
        self.cache.move_to_end(key)
        return self.cache[key]

    def _check_group(self, columns: dict[str, Any], where: str) -> None:
        """Raise unless a row group is like the first one and its numbers are possible."""
        ids, length = columns["input_ids"], self.sequence_length
        if ids.shape[1] != length + 1:
            raise DataError(
                f"{where}: rows of {ids.shape[1]} ids, but {self.groups[0][0]} has rows of {length + 1}; all rows of "
                "a set must be equally long, prepare it again"
            )
        if self.manifest is not None and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise DataError(
                f"{where} holds token ids {ids.min()} to {ids.max()}, but vocab_size of {MANIFEST} is "
                f"{self.vocab_size}; restore the manifest or prepare the data again"
            )
        if ("labels" in columns) != self.has_labels:
            raise DataError(f"{where}: some files have a column labels and some have none; prepare the data again")
        if self.has_labels and columns["labels"].shape[1] != length:
            raise DataError(
                f"{where}: rows have {columns['labels'].shape[1]} labels, but {length + 1} input_ids need {length}; "
                "prepare the data again"
            )
        if self.config.document_masking:
            _check_starts(columns.get("doc_starts"), length, where)


def _folder(config: PackedDataConfig, split: Split) -> Path:
    apart = config.validation_path if split == "validation" else None
    path = _local(apart or config.path, split, config.revision)
    if (path / split).is_dir():
        return path / split
    if split == "validation" and apart is None:
        raise DataError(f"{path} has no folder validation/; set data.packed.validation_path")
    return path


def _local(name: str, split: Split, revision: str | None) -> Path:
    """Return the folder of this name. That of a data set on the hub is in the hub's cache."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise DataError(f"{path} does not exist; run recurrent-depth prepare, or fix data.packed.path")
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise DataError(
            f"{name} is not a folder; for a data set on the hub: pip install 'recurrent-depth[data]'"
        ) from error
    wanted = [f"{split}/*", MANIFEST, TOKENIZER]
    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name} is neither a folder nor a data set that the Hugging Face hub gives ({type(error).__name__}: "
            f"{error}); run recurrent-depth prepare, fix data.packed.path, or log in"
        ) from error


def _row_groups(file: Path) -> list[tuple[int, int]]:
    try:
        metadata = pq.ParquetFile(file).metadata
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} is not a whole parquet file ({error}); prepare it again") from error
    return [(group, metadata.row_group(group).num_rows) for group in range(metadata.num_row_groups)]


def _columns(file: Path, group: int) -> dict[str, Any]:
    """Return the columns of a row group: `input_ids` and `labels` as matrices, `doc_starts` as a list of arrays."""
    try:
        table = pq.ParquetFile(file).read_row_group(group)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"row group {group} of {file} is damaged ({error}); prepare it again") from error
    if "input_ids" not in table.column_names:
        raise DataError(f"{file} has no column input_ids (it has {table.column_names}); prepare packed rows first")
    columns: dict[str, Any] = {}
    for name in ("input_ids", "labels", "doc_starts"):
        if name in table.column_names:
            lists = _integer_lists(table.column(name), f"{file}, row group {group}, column {name}")
            if name == "doc_starts":
                columns[name] = [row.values.to_numpy() for row in lists]
            else:
                columns[name] = _matrix(lists, f"{file}, row group {group}, column {name}")
    return columns


def _integer_lists(column: pa.ChunkedArray, where: str) -> pa.Array:
    """Return a column of lists of integers as one array."""
    kind = column.type
    lists_of_integers = (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    ) and pa.types.is_integer(kind.value_type)
    if not lists_of_integers:
        raise DataError(f"{where} is of type {kind}; it must hold lists of integers")
    lists = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):  # pyarrow < 21 may keep the chunks
        lists = pa.concat_arrays(lists.chunks)
    bad = pc.index(pc.is_null(lists), True).as_py()
    if bad < 0 and lists.flatten().null_count:
        bad = next(row for row, values in enumerate(lists) if values.values.null_count)
    if bad >= 0:
        raise DataError(f"{where}: row {bad} is null or holds null; prepare the data again")
    return lists


def _matrix(lists: pa.Array, where: str) -> np.ndarray:
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest != longest:
        raise DataError(
            f"{where}: row {int(lengths.argmin())} has {shortest} entries, row {int(lengths.argmax())} has {longest}; "
            "all rows of a set must be equally long, prepare it again"
        )
    if longest < (2 if where.endswith("input_ids") else 1):
        raise DataError(
            f"{where}: rows have {longest} entries; a row needs at least two tokens, prepare the data again"
        )
    return lists.flatten().to_numpy(zero_copy_only=False).reshape(len(lists), longest)


def _check_starts(rows: list[np.ndarray] | None, length: int, where: str) -> None:
    if rows is None:
        raise DataError(f"{where} has no column doc_starts; set data.packed.document_masking to false")
    flat = np.concatenate([[0], *rows])
    if flat.min() < 0 or flat.max() > length:
        number = next(n for n, starts in enumerate(rows) if ((starts < 0) | (starts > length)).any())
        raise DataError(
            f"{where}, row {number}: doc_starts is {rows[number].tolist()[:8]}; all must be positions from 0 to "
            f"{length}, prepare the data again"
        )


def _check_manifest(manifest: dict[str, Any], folder: Path, rows: int, length: int) -> None:
    """Raise unless the manifest fits the rows it lies beside."""
    split = manifest["splits"].get(folder.name, {}) if isinstance(manifest.get("splits"), dict) else {}
    found = {"vocab_size": manifest.get("vocab_size"), "sequence_length": manifest.get("sequence_length", length)}
    found[f"splits.{folder.name}.rows"] = split.get("rows", rows)
    expected = {"sequence_length": length, f"splits.{folder.name}.rows": rows}
    wrong = [
        f"{name} is {found[name]}, the files have {value}" for name, value in expected.items() if found[name] != value
    ]
    if not isinstance(found["vocab_size"], int) or found["vocab_size"] < 1:
        wrong.append(f"vocab_size is {found['vocab_size']}, it must be the number of token ids")
    if wrong:
        raise DataError(
            f"{MANIFEST} does not fit the rows in {folder}: {'; '.join(wrong)}. Restore the manifest (or remove it to "
            "train without one), or prepare the data again"
        )


def _hashed_parts(size: int, budget: int) -> list[tuple[int, int]]:
    """Return (start, length) of the parts of a file that its fingerprint covers."""
    if size <= budget:
        return [(start, min(1 << 24, size - start)) for start in range(0, size, 1 << 24)]
    count = max(2, budget // HASHED_BLOCK)
    return [(number * (size - HASHED_BLOCK) // (count - 1), HASHED_BLOCK) for number in range(count)]


def _documents(starts: list[np.ndarray], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return document_ids and restarting position_ids, each [B, length], from the document starts of each row."""
    opens = np.zeros((len(starts), length), dtype=np.int64)
    for row, positions in enumerate(starts):
        opens[row, positions[positions < length]] = 1
    documents = opens.cumsum(axis=1)
    places = np.arange(length)
    last_start = np.maximum.accumulate(np.where(opens == 1, places, 0), axis=1)
    return torch.from_numpy(documents), torch.from_numpy(places - last_start)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest beside packed rows; None for a set that came without one."""
    for path in (folder / MANIFEST, folder.parent / MANIFEST):
        if path.is_file():
            try:
                manifest = json.loads(path.read_text())
            except ValueError as error:
                raise DataError(f"{path} is not valid JSON ({error}); prepare the data again") from error
            if not isinstance(manifest, dict):
                raise DataError(f"{path} is not a JSON object; prepare the data again")
            return manifest
    return None
