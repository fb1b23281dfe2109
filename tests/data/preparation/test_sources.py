"""Sources cut into parts: the documents and their order do not depend on the size of a part."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recurrent_depth.data.config import PrepareConfig, SourceConfig
from recurrent_depth.data.layout import DataError
from recurrent_depth.data.preparation.command import prepare
from recurrent_depth.data.preparation.sources import cut, read

TEXTS = [f"text {n} " + "ä漢🙂"[n % 3] * (n % 23) for n in range(60)]


def source_of(address, **options):
    return SourceConfig(name="s", address=str(address), **options)


def texts_of(source, part_bytes):
    """Return (texts, number of parts)."""
    parts = cut(source, part_bytes)
    return [document.text for part in parts for document in read(source, part)], len(parts)


@settings(deadline=None, max_examples=40)
@given(part_bytes=st.integers(1, 4000))
def test_jsonl_documents_do_not_depend_on_part_size(tmp_path_factory, part_bytes):
    file = tmp_path_factory.mktemp("lines") / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS))
    assert texts_of(source_of(file), part_bytes)[0] == TEXTS


def test_folder_parts_keep_document_order(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, text in enumerate(TEXTS[:20]):
        (folder / f"a{number:02d}.txt").write_text(text)
    pq.write_table(pa.table({"text": TEXTS[20:], "n": range(40)}), folder / "b.parquet", row_group_size=7)
    small, many = texts_of(source_of(folder), 100)
    large, one = texts_of(source_of(folder), 10**6)
    assert small == large == TEXTS
    assert (many > 10, one) == (True, 1)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Make the real load_dataset read local folders for names of hub data sets. Return tmp_path."""
    import datasets

    load_dataset = datasets.load_dataset
    folder = tmp_path / "hub" / "someone--corpus"
    (folder / "part").mkdir(parents=True)
    for shard in range(3):
        rows = {"question": TEXTS[20 * shard : 20 * shard + 20], "answer": ["yes"] * 20}
        pq.write_table(pa.table(rows), folder / "part" / f"train-{shard}.parquet")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: part\n  data_files: part/*.parquet\n---\n")

    def local(name, *arguments, **options):
        return load_dataset(str(tmp_path / "hub" / name.replace("/", "--")), *arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    return tmp_path


def test_hub_data_set_has_one_part_per_shard(hub):
    source = source_of("someone/corpus", subset="part", fields=["question", "answer"], chat_formatted=True)
    texts, parts = texts_of(source, 10**9)
    assert parts == 3
    assert texts == [f"{text}\n\nyes" for text in TEXTS]
    (document, *_) = read(source, cut(source, 1)[1])
    assert document.turns == (("user", TEXTS[20]), ("assistant", "yes"))


def test_prepare_reads_every_document_of_hub_data_set(hub):
    config = PrepareConfig(
        out=str(hub / "data"), sources=[source_of("someone/corpus", subset="part", fields=["question"])],
        vocab_size=330, sequence_length=16, validation_share=0.3,
    )  # fmt: skip
    report = prepare(config)["sources"]["s"]
    assert report["documents_read"] == len(TEXTS)
    assert sum(split["documents"] for split in report["splits"].values()) == len(TEXTS)


@pytest.mark.parametrize("changes", [{"address": "someone/else"}, {"subset": "other"}, {"split": "dev"}])
def test_hub_error_names_missing_data_set(hub, changes):
    options = {"name": "mine", "address": "someone/corpus", "subset": "part"} | changes
    config = PrepareConfig(out=str(hub / "data"), sources=[SourceConfig(**options)])
    with pytest.raises(DataError, match=r"source mine: the data set someone/\w+ cannot be opened"):
        prepare(config)
    assert not (hub / "data.unfinished").exists()


def test_hub_error_names_missing_and_existing_fields(hub):
    source = source_of("someone/corpus", subset="part", fields=["body"])
    with pytest.raises(DataError, match=r"source s: someone/corpus: nothing in field 'body'.*\['answer', 'question'\]"):
        texts_of(source, 1)


def test_jsonl_error_names_line_that_is_not_json(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b"}\n{"text": \n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 3 is not JSON"):
        texts_of(source_of(file), 20)
