"""`prepare` from text to rows and back, and every kind of source."""

import errno
import itertools
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recurrent_depth.data.config import PrepareConfig
from recurrent_depth.data.preparation import rows as rows_module
from recurrent_depth.data.preparation.command import prepare
from recurrent_depth.data.preparation.encoding import DocumentEncoder
from recurrent_depth.data.preparation.sources import read_documents
from recurrent_depth.data.tokenizer import load_tokenizer

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


def test_prepared_rows_decode_to_source_text(corpus, tmp_path):
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
def test_source_reads_text_file_parquet_and_folder(tmp_path, form):
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


def test_source_python_stdlib_reads_python_files():
    names = [document.origin for document, _ in zip(read_documents("python-stdlib"), range(40), strict=False)]
    assert len(names) == 40
    assert all(name.endswith(".py") and "site-packages" not in name for name in names)


def test_source_reads_hub_data_set_by_name_and_subset(corpus, tmp_path, monkeypatch):
    import datasets

    local = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=str(tmp_path / "cache"))
    asked = []

    def load(name, subset, split, revision, streaming):
        asked.append((name, subset, split, streaming))
        return local.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [document.text for document in read_documents("someone/corpus:part")] == TEXTS
    assert set(asked) == {("someone/corpus", "part", "train", True)}


def test_default_prepared_rows_fit_quickstart_model():
    """`train --config .../text.yaml` reads the rows that `prepare --source python-stdlib` writes."""
    model = yaml.safe_load((HUGINN_MIX.parents[1] / "pretrain" / "quickstart" / "text.yaml").read_text())["model"]
    config = PrepareConfig(out="data", source=["python-stdlib"])
    assert config.sequence_length <= model["block_size"]
    assert config.vocab_size <= model["vocab_size"]


def test_prepare_refuses_existing_output_folder(corpus, tmp_path):
    prepare(config_for(corpus, tmp_path / "data"))
    with pytest.raises(FileExistsError):
        prepare(config_for(corpus, tmp_path / "data"))


def test_prepare_on_full_disk_keeps_finished_tasks_and_no_partial_files(corpus, tmp_path, monkeypatch):
    expected = prepare(config_for(corpus, tmp_path / "expected"))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(rows_module.pq, "write_table", full)
        with pytest.raises(OSError, match=r"while writing .*run the command again"):
            prepare(config_for(corpus, tmp_path / "data"))
    assert not (tmp_path / "data").exists()
    assert not list((tmp_path / "data.unfinished").rglob("*.tmp"))
    with monkeypatch.context() as patch:  # finished tasks are not repeated
        patch.setattr(DocumentEncoder, "encode", None)
        assert prepare(config_for(corpus, tmp_path / "data")) == expected
