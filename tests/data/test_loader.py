"""Packed rows as training reads them: every row once per epoch, in an order fixed by the seed."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recurrent_depth.data.config import DataConfig, PackedDataConfig, PrepareConfig
from recurrent_depth.data.layout import DataError
from recurrent_depth.data.loader import open_source
from recurrent_depth.data.preparation import rows as rows_module
from recurrent_depth.data.preparation.command import prepare
from recurrent_depth.data.tokenizer import load_tokenizer

TEXTS = [f"Document {i}: " + " ".join(f"word{(i * j) % 97}" for j in range(60)) for i in range(120)]


def prepared(folder, **changes):
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    options = {"vocab_size": 400, "sequence_length": 32, "validation_share": 0.2, "files": 3} | changes
    prepare(PrepareConfig(out=str(folder / "data"), source=[str(folder / "corpus.jsonl")], **options))
    return folder / "data"


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "ROWS_PER_GROUP", 7)
    return prepared(tmp_path)


def rows_of(source, first, count):
    return [tuple(row) for row in source.batch(first, count, 0).input_ids.tolist()]


def packed(folder, split="train", seed=0, **options):
    return open_source(DataConfig(packed=PackedDataConfig(str(folder), **options)), split, seed, total_steps=1)


def test_packed_epoch_has_every_row_once_and_epochs_differ(data):
    source = packed(data)
    n = source.rows_per_epoch
    stored = [tuple(row[:-1]) for row in pq.read_table(data / "train").column("input_ids").to_pylist()]
    first, second = rows_of(source, 0, n), rows_of(source, n, n)
    assert sorted(first) == sorted(second) == sorted(stored)
    assert first != second
    assert first != stored


def test_packed_rows_depend_only_on_row_number(data):
    source = packed(data, seed=5)
    n = source.rows_per_epoch
    order = rows_of(source, 0, n + 16)
    assert rows_of(packed(data, seed=5), n - 8, 24) == order[n - 8 :]
    shares = [rows_of(packed(data, seed=5), start, 8) for start in (n, n + 8)]
    assert shares[0] + shares[1] == order[n:]


def test_packed_targets_are_next_tokens(data):
    batch = packed(data, "validation").batch(0, 4, 0)
    assert torch.equal(batch.input_ids[:, 1:], batch.targets[:, :-1])


def test_packed_document_ids_and_positions_follow_document_starts(data):
    source = packed(data, document_masking=True, restart_positions=True)
    batch = source.batch(0, source.rows_per_epoch, 0)
    begin = load_tokenizer(data).token_to_id("<|begin_text|>")
    for ids, documents, positions in zip(batch.input_ids, batch.document_ids, batch.position_ids, strict=True):
        for t in range(1, 32):
            opens = ids[t].item() == begin
            assert (documents[t] - documents[t - 1]).item() == int(opens)
            assert positions[t].item() == (0 if opens else positions[t - 1].item() + 1)


def test_packed_rows_without_a_manifest_are_read(tmp_path):
    (tmp_path / "train").mkdir()
    rows = [[(7 * i + j) % 50 for j in range(4097)] for i in range(3)]
    pq.write_table(pa.table({"input_ids": rows}), tmp_path / "train" / "a.parquet")
    source = packed(tmp_path)
    assert source.sequence_length == 4096
    assert sorted(rows_of(source, 0, 3)) == sorted(tuple(row[:-1]) for row in rows)


def test_packed_source_fingerprint_changes_with_data(data, tmp_path):
    before = packed(data).fingerprint()
    assert packed(data).fingerprint() == before
    (tmp_path / "other").mkdir()
    assert packed(prepared(tmp_path / "other", policy="huginn")).fingerprint() != before


def test_packed_source_error_names_damaged_file(data):
    file = sorted((data / "train").glob("*.parquet"))[0]
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=file.name):
        packed(data)


def test_packed_source_refuses_tokenizer_that_differs_from_manifest(data):
    (data / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not the tokenizer"):
        packed(data).tokenizer_json()


def test_packed_source_error_names_missing_folder_or_split(data, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        packed(tmp_path / "nothing")
    with pytest.raises(DataError, match="validation_path"):
        packed(data / "train", "validation")
