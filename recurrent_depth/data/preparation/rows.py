"""Packed rows in files: one Arrow file per part while a set is prepared, parquet when it is finished."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recurrent_depth.data.config import Policy
from recurrent_depth.data.layout import DataError
from recurrent_depth.data.preparation.packing import Packer, Row

ROWS_PER_GROUP = 1000


def row_schema(vocab_size: int, labels: bool = False) -> pa.Schema:
    """Return the columns of packed rows: 16-bit ids while the vocabulary fits."""
    columns = {"input_ids": pa.uint16() if vocab_size <= 2**16 else pa.int32()}
    if labels:
        columns["labels"] = pa.int32()
    columns["doc_starts"] = pa.int32()
    return pa.schema([(name, pa.list_(kind)) for name, kind in columns.items()])


def row_batch(rows: Sequence[Row], schema: pa.Schema) -> pa.RecordBatch:
    """Return rows as an Arrow batch."""
    ids = np.concatenate([row.input_ids for row in rows])
    ends = np.cumsum([0, *(len(row.input_ids) for row in rows)])
    kind = schema.field("input_ids").type.value_type
    input_ids = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(ids, kind))
    doc_starts = pa.array([row.doc_starts for row in rows], schema.field("doc_starts").type)
    return pa.record_batch([input_ids, doc_starts], schema=schema)


class RowFile:
    """Packs documents and writes rows as they become full; at most one group of rows is held in memory."""

    def __init__(self, file: Path, length: int, policy: Policy, schema: pa.Schema) -> None:
        self.schema, self.packer = schema, Packer(length, policy)
        self.writer = pa.ipc.new_file(str(file), schema)
        self.waiting: list[Row] = []
        self.documents = self.bytes = self.rows = 0

    def add(self, ids: np.ndarray, size: int) -> None:
        """Pack one document of `size` bytes."""
        self.documents += 1
        self.bytes += size
        self._keep(self.packer.add(ids))

    def finish(self) -> dict[str, int]:
        """Write what is left; return the counts of documents, bytes, rows and tokens."""
        self._keep(self.packer.finish())
        self._write(self.waiting)
        self.writer.close()
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "rows": self.rows,
            "tokens_kept": self.rows * self.packer.length,
            "tokens_cut": self.packer.rests,
            "tokens_unfilled": self.packer.unfilled,
        }

    def _keep(self, rows: Iterable[Row]) -> None:
        self.waiting.extend(rows)
        while len(self.waiting) >= ROWS_PER_GROUP:
            self._write(self.waiting[:ROWS_PER_GROUP])
            self.waiting = self.waiting[ROWS_PER_GROUP:]

    def _write(self, rows: Sequence[Row]) -> None:
        if rows:
            self.writer.write_batch(row_batch(rows, self.schema))
            self.rows += len(rows)


def take_rows(file: Path, numbers: np.ndarray) -> pa.Table:
    """Return some rows of an Arrow file, by number. The file is mapped, so only these are read."""
    try:
        with pa.memory_map(str(file)) as content:
            return pa.ipc.open_file(content).read_all().take(numbers)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} is damaged ({error}); use --restart true to start over") from error


def write_parquet(table: pa.Table, file: Path) -> None:
    """Write rows in the form that training reads."""
    pq.write_table(table, file, compression="zstd", row_group_size=ROWS_PER_GROUP)
