"""Checks of packed rows: errors name the file and the row, and the fingerprint depends on the content."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recurrent_depth.data.config import PackedDataConfig
from recurrent_depth.data.layout import DataError
from recurrent_depth.data.packed import PackedSource

ROWS = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 1], [2, 3, 4, 5, 6]]


def write(folder, columns, name="a", row_group_size=None):
    (folder / "train").mkdir(parents=True, exist_ok=True)
    file = folder / "train" / f"{name}.parquet"
    pq.write_table(pa.table(columns), file, row_group_size=row_group_size)
    return file


def read_all(folder, **options):
    source = PackedSource(PackedDataConfig(str(folder), **options), "train", seed=0)
    return source.batch(0, source.rows_per_epoch, 0)


BAD_ROWS = {
    "a null row": ([ROWS[0], None, ROWS[2]], "row 1 is null"),
    "a null id": ([ROWS[0], ROWS[1], [1, None, 3, 4, 5]], "row 2 is null or holds null"),
    "a short row": ([ROWS[0], [1, 2], ROWS[2]], "row 1 has 2 entries, row 0 has 5"),
    "empty rows": (pa.array([[], [], []], pa.list_(pa.int32())), "rows have 0 entries"),
    "one token": ([[1], [2], [3]], "rows have 1 entries"),
    "text": (["a", "b", "c"], "type string; it must hold lists of integers"),
    "numbers": ([1, 2, 3], "type int64; it must hold lists of integers"),
    "fractions": ([[0.5, 1.5], [1.0, 2.0], [3.0, 4.0]], "must hold lists of integers"),
}


@pytest.mark.parametrize(("rows", "words"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_packed_source_refuses_invalid_input_ids(tmp_path, rows, words):
    write(tmp_path, {"input_ids": rows})
    with pytest.raises(DataError, match=rf"a\.parquet, row group 0, column input_ids.*{words}"):
        read_all(tmp_path)


def test_packed_source_refuses_invalid_row_of_later_row_group(tmp_path):
    write(tmp_path, {"input_ids": [ROWS[0], ROWS[1], None]}, row_group_size=2)
    with pytest.raises(DataError, match=r"row group 1, column input_ids: row 0 is null"):
        read_all(tmp_path)


def test_packed_source_refuses_files_with_different_row_lengths(tmp_path):
    write(tmp_path, {"input_ids": ROWS})
    write(tmp_path, {"input_ids": [[1, 2, 3]]}, name="b")
    with pytest.raises(DataError, match=r"b\.parquet, row group 0: rows of 3 ids, but .*a\.parquet has rows of 5"):
        read_all(tmp_path)


def test_packed_source_refuses_labels_that_do_not_match_ids(tmp_path):
    write(tmp_path, {"input_ids": ROWS, "labels": ROWS})
    with pytest.raises(DataError, match="5 labels, but 5 input_ids need 4"):
        read_all(tmp_path)
    write(tmp_path, {"input_ids": ROWS, "labels": [row[1:] for row in ROWS]})
    write(tmp_path, {"input_ids": ROWS}, name="b")
    with pytest.raises(DataError, match="some files have a column labels and some have none"):
        read_all(tmp_path)


@pytest.mark.parametrize(
    ("starts", "words"),
    [
        ([[0], [-1, 2], [0]], r"row 1: doc_starts is \[-1, 2\]; all must be positions from 0 to 4"),
        ([[0], [0], [0, 5]], r"row 2: doc_starts is \[0, 5\]"),
        ([[0], None, [0]], "doc_starts: row 1 is null"),
        ([[0], [None], [0]], "doc_starts: row 1 is null or holds null"),
        ([["0"], ["1"], ["2"]], "must hold lists of integers"),
    ],
)
def test_packed_source_refuses_invalid_document_starts(tmp_path, starts, words):
    write(tmp_path, {"input_ids": ROWS, "doc_starts": starts})
    with pytest.raises(DataError, match=words):
        read_all(tmp_path, document_masking=True)


def test_packed_document_starts_may_be_empty_or_last_position(tmp_path):
    write(tmp_path, {"input_ids": ROWS, "doc_starts": pa.array([[], [0, 2], [4]], pa.list_(pa.int32()))})
    batch = read_all(tmp_path, document_masking=True, restart_positions=True)
    expected = {
        (1, 2, 3, 4): ([0, 0, 0, 0], [0, 1, 2, 3]),
        (6, 7, 8, 9): ([1, 1, 2, 2], [0, 1, 0, 1]),
        (2, 3, 4, 5): ([0, 0, 0, 0], [0, 1, 2, 3]),
    }
    for ids, documents, positions in zip(batch.input_ids, batch.document_ids, batch.position_ids, strict=True):
        assert (documents.tolist(), positions.tolist()) == expected[tuple(ids.tolist())]


GOOD = {"vocab_size": 10, "sequence_length": 4, "splits": {"train": {"rows": 3}}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"splits": {"train": {"rows": 30}}}, r"splits\.train\.rows is 30, the files have 3"),
        ({"sequence_length": 8}, "sequence_length is 8, the files have 4"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"vocab_size": "10"}, "vocab_size is 10, it must be"),
        ({"vocab_size": 9}, r"a\.parquet, row group 0 holds token ids 1 to 9, but vocab_size of manifest\.json is 9"),
    ],
)
def test_packed_source_refuses_manifest_that_contradicts_rows(tmp_path, changes, words):
    write(tmp_path, {"input_ids": ROWS})
    (tmp_path / "manifest.json").write_text(json.dumps(GOOD))
    read_all(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(GOOD | changes))
    with pytest.raises(DataError, match=words):
        read_all(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", "\xff"])
def test_packed_source_error_names_damaged_manifest(tmp_path, content):
    write(tmp_path, {"input_ids": ROWS})
    (tmp_path / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"manifest\.json is not"):
        read_all(tmp_path)


def fingerprint(folder):
    return PackedSource(PackedDataConfig(str(folder)), "train", seed=0).fingerprint()


@pytest.mark.parametrize("hashed_bytes", [1 << 30, 1 << 18])
def test_packed_source_fingerprint_differs_for_files_of_equal_size(tmp_path, monkeypatch, hashed_bytes):
    """If only a sample of the bytes is hashed, a changed row changes sampled bytes or the statistics in the footer."""
    monkeypatch.setattr("recurrent_depth.data.packed.HASHED_BYTES", hashed_bytes)
    rows = [[(i * j * 7919) % 60000 for j in range(1, 258)] for i in range(1, 1001)]
    for name, first in (("one", 1), ("same", 1), ("other", 2)):
        write(tmp_path / name, {"input_ids": [[first, *row[1:]] for row in rows]}, row_group_size=100)
    size = (tmp_path / "one" / "train" / "a.parquet").stat().st_size
    assert size > 1 << 18
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "same")
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "other")
