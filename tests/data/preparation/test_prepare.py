"""From text to rows, and back."""

import dataclasses
import errno
import itertools
import json
import sysconfig
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from recurrent_depth.data.config import DataConfig, FilterConfig, PackedDataConfig, PrepareConfig
from recurrent_depth.data.layout import DataError
from recurrent_depth.data.loader import open_source
from recurrent_depth.data.preparation import rows as rows_module
from recurrent_depth.data.preparation.command import prepare
from recurrent_depth.data.preparation.encoding import DocumentEncoder
from recurrent_depth.data.preparation.sources import read_documents
from recurrent_depth.data.tokenizer import SPECIAL_TOKENS, load_tokenizer, train_tokenizer
from recurrent_depth.parsing import parse_options

TEXTS = [f"Document {i}: " + " ".join(f"word{(i * j) % 97}" for j in range(60)) for i in range(120)]

HUGINN_MIX = Path(__file__).parents[3] / "configs" / "data" / "huginn_mix.yaml"


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


def config_for(corpus, out, **changes):
    defaults = {"vocab_size": 400, "sequence_length": 32, "validation_share": 0.2}
    return PrepareConfig(out=str(out), source=[str(corpus)], **(defaults | changes))


def test_rows_hold_the_text(corpus, tmp_path):
    manifest = prepare(config_for(corpus, tmp_path / "data", sequence_length=2000))
    tokenizer = load_tokenizer(tmp_path / "data")
    assert tokenizer.get_vocab_size() == 400 == manifest["vocab_size"]
    tokens, whole = Counter(), []
    for split in ("train", "validation"):
        table = pq.read_table(tmp_path / "data" / split)
        rows, starts = table.column("input_ids").to_pylist(), table.column("doc_starts").to_pylist()
        assert len(rows) == manifest["splits"][split]["rows"]
        assert {len(row) for row in rows} == {2001}
        for row, places in zip(rows, starts, strict=True):
            tokens.update(row)
            whole += [tokenizer.decode(row[a:b]) for a, b in itertools.pairwise(places)]
    assert len(whole) > len(TEXTS) / 2
    assert len(set(whole)) == len(whole)
    assert set(whole) <= set(TEXTS)
    expected = Counter(i for text in TEXTS for i in [0, *tokenizer.encode(text).ids])
    assert tokens <= expected
    splits = manifest["splits"].values()
    assert expected.total() - tokens.total() == sum(split["tokens_dropped"] for split in splits)
    assert sum(split["documents"] for split in splits) == len(TEXTS)


def test_preparation_is_deterministic(corpus, tmp_path):
    first, second = (prepare(config_for(corpus, tmp_path / name)) for name in ("a", "b"))
    assert first["content"] == second["content"]
    assert first["tokenizer_sha256"] == second["tokenizer_sha256"]


@pytest.mark.parametrize("form", ["txt", "parquet", "folder"])
def test_other_sources(tmp_path, form):
    folder = tmp_path / "texts"
    folder.mkdir()
    if form == "parquet":
        pq.write_table(pa.table({"text": TEXTS}), folder / "a.parquet")
        source = folder / "a.parquet"
    else:
        for number, text in enumerate(TEXTS):
            (folder / f"{number:03d}.txt").write_text(text)
        source = folder if form == "folder" else folder / "000.txt"
    texts = [document.text for document in read_documents(str(source))]
    assert texts == (TEXTS[:1] if form == "txt" else TEXTS)


def test_the_standard_library_is_a_source():
    names = [document.origin for document, _ in zip(read_documents("python-stdlib"), range(40), strict=False)]
    assert len(names) == 40
    assert all(name.endswith(".py") and "site-packages" not in name for name in names)


def test_a_data_set_from_datasets(corpus, tmp_path, monkeypatch):
    import datasets

    local = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=str(tmp_path / "cache"))
    asked = []

    def load(name, subset, split, revision, streaming):
        asked.append((name, subset, split, streaming))
        return local.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [document.text for document in read_documents("someone/corpus:part")] == TEXTS
    assert set(asked) == {("someone/corpus", "part", "train", True)}


def test_any_text_survives_the_tokenizer():
    tokenizer = train_tokenizer(TEXTS, 300)
    for text in ("naïve — 漢字 🙂", "tabs\tand\nlines\r\n", "".join(map(chr, range(32, 1000)))):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert len(SPECIAL_TOKENS) >= 32


def test_rows_prepared_by_default_fit_the_quickstart_model():
    """`prepare --source python-stdlib --out D`, then `train --config .../text.yaml` on D."""
    model = yaml.safe_load((HUGINN_MIX.parents[1] / "pretrain" / "quickstart" / "text.yaml").read_text())["model"]
    config = PrepareConfig(out="data", source=["python-stdlib"])
    assert config.sequence_length <= model["block_size"]
    assert config.vocab_size <= model["vocab_size"]


@pytest.mark.slow
def test_a_tokenizer_of_full_size(tmp_path):
    """65,536 entries from the standard library and its tests: all ids fit 16 bits, special tokens are inside."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in sorted(root.rglob("*.py")) if "site-packages" not in file.parts]
    texts = [json.dumps({"text": file.read_text(errors="replace")}) + "\n" for file in files]
    (tmp_path / "texts.jsonl").write_text("".join(texts))
    config = parse_options(PrepareConfig, ["--config", str(HUGINN_MIX), "--out", str(tmp_path / "data")])
    assert config.vocab_size == 2**16
    small = dataclasses.replace(
        config, source=[str(tmp_path / "texts.jsonl")], sources=[], category_shares={}, filters=FilterConfig(), files=1,
        sequence_length=512, policy="concat", validation_share=0.1,
    )  # fmt: skip
    assert prepare(small)["vocab_size"] == 2**16
    tokenizer = load_tokenizer(tmp_path / "data")
    assert tokenizer.get_vocab_size() == 2**16
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(32))
    rows = pq.read_table(tmp_path / "data" / "train").column("input_ids")
    assert rows.type == pa.list_(pa.uint16())
    ids = rows.combine_chunks().flatten().to_numpy()
    assert 2**15 < int(ids.max()) < 2**16


class TestBadInput:
    def test_empty_corpus(self, tmp_path):
        (tmp_path / "empty.txt").write_text(" \n")
        with pytest.raises(DataError, match="no text"):
            prepare(config_for(tmp_path / "empty.txt", tmp_path / "data"))
        assert not (tmp_path / "data").exists()

    def test_a_corpus_shorter_than_a_row(self, corpus, tmp_path):
        with pytest.raises(DataError, match="too few for one row"):
            prepare(config_for(corpus, tmp_path / "data", sequence_length=100_000))
        assert not (tmp_path / "data").exists()

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl"):
            prepare(config_for(tmp_path / "nothing.jsonl", tmp_path / "data"))

    def test_missing_field(self, corpus, tmp_path):
        with pytest.raises(DataError, match=r"line 1.*'body'.*--field"):
            prepare(config_for(corpus, tmp_path / "data", field="body"))

    def test_truncated_parquet(self, tmp_path):
        file = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": TEXTS}), file)
        file.write_bytes(file.read_bytes()[:-20])
        with pytest.raises(DataError, match=r"a\.parquet cannot be read as parquet"):
            list(read_documents(str(file)))

    def test_an_existing_data_set_is_not_overwritten(self, corpus, tmp_path):
        prepare(config_for(corpus, tmp_path / "data"))
        with pytest.raises(FileExistsError):
            prepare(config_for(corpus, tmp_path / "data"))

    def test_a_full_disk_leaves_nothing_half_written_and_loses_nothing(self, corpus, tmp_path, monkeypatch):
        expected = prepare(config_for(corpus, tmp_path / "expected"))

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(rows_module.pq, "write_table", full)
            with pytest.raises(OSError, match=r"while writing .*run the command again"):
                prepare(config_for(corpus, tmp_path / "data"))
        assert not (tmp_path / "data").exists()
        assert not list((tmp_path / "data.unfinished").rglob("*.tmp"))
        with monkeypatch.context() as patch:  # what was finished is not done again
            patch.setattr(DocumentEncoder, "encode", None)
            assert prepare(config_for(corpus, tmp_path / "data")) == expected


class TestPackedSource:
    @pytest.fixture
    def data(self, corpus, tmp_path, monkeypatch):
        monkeypatch.setattr(rows_module, "ROWS_PER_GROUP", 7)
        prepare(config_for(corpus, tmp_path / "data", files=3))
        return tmp_path / "data"

    @staticmethod
    def rows(source, first, count):
        return [tuple(row) for row in source.batch(first, count, 0).input_ids.tolist()]

    def test_an_epoch_has_every_row_once_and_epochs_differ(self, data):
        source = open_source(DataConfig(packed=PackedDataConfig(str(data))), "train", seed=0, total_steps=1)
        n = source.rows_per_epoch
        stored = [tuple(row[:-1]) for row in pq.read_table(data / "train").column("input_ids").to_pylist()]
        first, second = self.rows(source, 0, n), self.rows(source, n, n)
        assert sorted(first) == sorted(second) == sorted(stored)
        assert first != second
        assert first != stored

    def test_a_fresh_source_goes_on_where_another_stopped(self, data):
        config = DataConfig(packed=PackedDataConfig(str(data)))
        source = open_source(config, "train", seed=5, total_steps=1)
        n = source.rows_per_epoch
        order = self.rows(source, 0, n + 16)
        later = open_source(config, "train", seed=5, total_steps=1)
        assert self.rows(later, n - 8, 24) == order[n - 8 :]
        shares = [self.rows(open_source(config, "train", 5, 1), start, 8) for start in (n, n + 8)]
        assert shares[0] + shares[1] == order[n:]

    def test_targets_are_the_next_tokens(self, data):
        batch = open_source(DataConfig(packed=PackedDataConfig(str(data))), "validation", 0, 1).batch(0, 4, 0)
        assert torch.equal(batch.input_ids[:, 1:], batch.targets[:, :-1])

    def test_documents_and_positions(self, data):
        config = DataConfig(packed=PackedDataConfig(str(data), document_masking=True, restart_positions=True))
        source = open_source(config, "train", 0, 1)
        batch = source.batch(0, source.rows_per_epoch, 0)
        begin = load_tokenizer(data).token_to_id("<|begin_text|>")
        for ids, documents, positions in zip(batch.input_ids, batch.document_ids, batch.position_ids, strict=True):
            for t in range(1, 32):
                opens = ids[t].item() == begin
                assert (documents[t] - documents[t - 1]).item() == int(opens)
                assert positions[t].item() == (0 if opens else positions[t - 1].item() + 1)

    def test_rows_without_a_manifest_as_huginn_released_them(self, tmp_path):
        (tmp_path / "train").mkdir()
        rows = [[(7 * i + j) % 50 for j in range(4097)] for i in range(3)]
        pq.write_table(pa.table({"input_ids": rows}), tmp_path / "train" / "a.parquet")
        source = open_source(DataConfig(packed=PackedDataConfig(str(tmp_path))), "train", 0, 1)
        assert source.sequence_length == 4096
        assert sorted(self.rows(source, 0, 3)) == sorted(tuple(row[:-1]) for row in rows)

    def test_a_changed_data_set_has_another_fingerprint(self, data, corpus, tmp_path):
        before = open_source(DataConfig(packed=PackedDataConfig(str(data))), "train", 0, 1).fingerprint()
        assert open_source(DataConfig(packed=PackedDataConfig(str(data))), "train", 0, 1).fingerprint() == before
        prepare(config_for(corpus, tmp_path / "other", policy="huginn"))
        assert (
            open_source(DataConfig(packed=PackedDataConfig(str(tmp_path / "other"))), "train", 0, 1).fingerprint()
            != before
        )

    def test_damage_is_named(self, data):
        file = sorted((data / "train").glob("*.parquet"))[0]
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(DataError, match=file.name):
            open_source(DataConfig(packed=PackedDataConfig(str(data))), "train", 0, 1)

    def test_another_tokenizer_is_an_error(self, data):
        (data / "tokenizer.json").write_text("{}")
        with pytest.raises(DataError, match="not the tokenizer"):
            open_source(DataConfig(packed=PackedDataConfig(str(data))), "train", 0, 1).tokenizer_json()

    def test_missing_folder_and_missing_split(self, data, tmp_path):
        with pytest.raises(DataError, match="does not exist"):
            open_source(DataConfig(packed=PackedDataConfig(str(tmp_path / "nothing"))), "train", 0, 1)
        with pytest.raises(DataError, match="validation_path"):
            open_source(DataConfig(packed=PackedDataConfig(str(data / "train"))), "validation", 0, 1)
