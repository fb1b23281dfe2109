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


class PackedSource:
    """Rows of parquet files in a seeded order.

    Every epoch permutes the row groups of all files, and the rows within each: sequential reading touches one row
    group at a time, and every row comes exactly once an epoch, whatever the number of ranks.
    """

    def __init__(self, config: PackedDataConfig, split: Split, seed: int) -> None:
        self.config, self.seed = config, seed
        self.folder = _folder(config, split)
        self.name = config.path
        self.files = sorted(self.folder.glob("*.parquet"))
        if not self.files:
            raise DataError(f"{self.folder} holds no parquet files; run recurrent-depth prepare --out {config.path}")
        self.groups = [(file, group, rows) for file in self.files for group, rows in _row_groups(file)]
        self.rows_per_epoch = sum(rows for _, _, rows in self.groups)
        if not self.rows_per_epoch:
            raise DataError(f"{self.folder} holds no rows; prepare more text or shorter rows")
        self.manifest = read_manifest(self.folder)
        self.cache: OrderedDict[tuple[Path, int], dict[str, Any]] = OrderedDict()
        first = self._read_group(self.groups[0][0], self.groups[0][1])["input_ids"]
        self.sequence_length = first.shape[1] - 1
        self.vocab_size = self.manifest["vocab_size"] if self.manifest else int(first.max()) + 1
        self.order: tuple[int, np.ndarray, np.ndarray] | None = None
        self.shuffled: tuple[int, int, np.ndarray] | None = None
        if config.document_masking and "doc_starts" not in self._read_group(*self.groups[0][:2]):
            raise DataError(f"{self.files[0]} has no column doc_starts; set data.packed.document_masking to false")

    def fingerprint(self) -> str:
        shape = [(file.name, group, rows) for file, group, rows in self.groups]
        content = (self.manifest or {}).get("content")
        return hashlib.sha256(json.dumps([shape, content, self.sequence_length]).encode()).hexdigest()[:16]

    def tokenizer_json(self) -> str | None:
        """The tokenizer beside the rows; one that is not the manifest's is an error."""
        candidates = [self.folder / TOKENIZER, self.folder.parent / TOKENIZER]
        file = next((file for file in candidates if file.is_file()), None)
        if file is None:
            return None
        content = file.read_bytes()
        if self.manifest and hashlib.sha256(content).hexdigest() != self.manifest["tokenizer_sha256"]:
            raise DataError(
                f"{file} is not the tokenizer the rows were made with; restore it or prepare the data again"
            )
        return content.decode()

    def batch(self, first_row: int, count: int, step: int) -> Batch:
        rows = [self._row(number) for number in range(first_row, first_row + count)]
        ids = torch.from_numpy(np.stack([row["input_ids"] for row in rows]).astype(np.int64))
        targets = ids[:, 1:]
        if "labels" in rows[0]:
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
        """Row groups in the order of this epoch, and the row number at which each ends."""
        if self.order is None or self.order[0] != epoch:
            order = self._generator(epoch, 0).permutation(len(self.groups))
            ends = np.cumsum([self.groups[index][2] for index in order])
            self.order = (epoch, order, ends)
        return self.order[1], self.order[2]

    def _order_within(self, epoch: int, group: int) -> np.ndarray:
        """Rows of a row group in the order of this epoch."""
        if self.shuffled is None or self.shuffled[:2] != (epoch, group):
            self.shuffled = (epoch, group, self._generator(epoch, group + 1).permutation(self.groups[group][2]))
        return self.shuffled[2]

    def _generator(self, epoch: int, what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, what])

    def _read_group(self, file: Path, group: int) -> dict[str, Any]:
        key = (file, group)
        if key not in self.cache:
            self.cache[key] = _columns(file, group)
            if len(self.cache) > _CACHED_GROUPS:
                self.cache.popitem(last=False)
        self.cache.move_to_end(key)
        return self.cache[key]


def _folder(config: PackedDataConfig, split: Split) -> Path:
    apart = config.validation_path if split == "validation" else None
    path = _local(apart or config.path, split, config.revision)
    if (path / split).is_dir():
        return path / split
    if split == "validation" and apart is None:
        raise DataError(f"{path} has no folder validation/; set data.packed.validation_path")
    return path


def _local(name: str, split: Split, revision: str | None) -> Path:
    """The folder of this name; that of a data set on the hub, which has a folder for each split, is in its cache."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise DataError(f"{path} does not exist; run recurrent-depth prepare, or mend data.packed.path")
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise DataError(
            f"{name} is no folder; for a data set on the hub: pip install 'recurrent-depth[data]'"
        ) from error
    wanted = [f"{split}/*", MANIFEST, TOKENIZER]
    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name} is neither a folder nor a data set that the Hugging Face hub gives ({type(error).__name__}: "
            f"{error}); run recurrent-depth prepare, mend data.packed.path, or log in"
        ) from error


def _row_groups(file: Path) -> list[tuple[int, int]]:
    try:
        metadata = pq.ParquetFile(file).metadata
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} is not a whole parquet file ({error}); prepare it again") from error
    return [(group, metadata.row_group(group).num_rows) for group in range(metadata.num_row_groups)]


def _columns(file: Path, group: int) -> dict[str, Any]:
    try:
        table = pq.ParquetFile(file).read_row_group(group)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"row group {group} of {file} is damaged ({error}); prepare it again") from error
    if "input_ids" not in table.column_names:
        raise DataError(f"{file} has no column input_ids (it has {table.column_names}); prepare packed rows first")
    columns: dict[str, Any] = {}
    for name in ("input_ids", "labels"):
        if name in table.column_names:
            columns[name] = _matrix(table.column(name), file, name)
    if "doc_starts" in table.column_names:
        columns["doc_starts"] = [row.values.to_numpy() for row in table.column("doc_starts")]
    return columns


def _matrix(column: pa.ChunkedArray, file: Path, name: str) -> np.ndarray:
    lists = column.combine_chunks()
    flat = lists.flatten().to_numpy(zero_copy_only=False)
    lengths = pc.unique(pc.list_value_length(lists)).to_pylist()
    if len(lengths) != 1:
        raise DataError(f"{file}: rows of {name} have different lengths {sorted(lengths)[:4]}; they must all be equal")
    return flat.reshape(len(lists), -1)


def _documents(starts: list[np.ndarray], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """document_ids and restarting position_ids, each [B, length], from the document starts of each row."""
    opens = np.zeros((len(starts), length), dtype=np.int64)
    for row, positions in enumerate(starts):
        opens[row, positions[positions < length]] = 1
    documents = opens.cumsum(axis=1)
    places = np.arange(length)
    last_start = np.maximum.accumulate(np.where(opens == 1, places, 0), axis=1)
    return torch.from_numpy(documents), torch.from_numpy(places - last_start)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest beside packed rows; None for a set that came without one."""
    for path in (folder / MANIFEST, folder.parent / MANIFEST):
        if path.is_file():
            try:
                return json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise DataError(f"{path} is not valid JSON ({error}); prepare the data again") from error
    return None
