"""Errors of `prepare`: each names the cause and the fix, and leaves no files behind."""

import errno
import json
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recurrent_depth.cli import main
from recurrent_depth.data.config import FilterConfig, PrepareConfig, SourceConfig
from recurrent_depth.data.layout import DataError, ResumableError
from recurrent_depth.data.preparation import rows as rows_module
from recurrent_depth.data.preparation.command import prepare
from recurrent_depth.data.preparation.sources import read_documents
from recurrent_depth.data.tokenizer import train_tokenizer
from recurrent_depth.errors import UserError

TEXTS = [f"Document {i}: " + " ".join(f"word{(i * j) % 97}" for j in range(60)) for i in range(60)]


@pytest.fixture
def corpus(tmp_path):
    return write_lines(tmp_path / "corpus.jsonl", [json.dumps({"text": text}) for text in TEXTS])


def write_lines(file, lines):
    file.write_text("".join(line + "\n" for line in lines))
    return file


def config_for(source, out, **changes):
    options = {"vocab_size": 400, "sequence_length": 32, "validation_share": 0.2}
    return PrepareConfig(out=str(out), source=[str(source)], **(options | changes))


def everything(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def refused(tmp_path, config, message, error=ValueError):
    """Check that `prepare` raises the error and changes no file or folder."""
    before = everything(tmp_path)
    with pytest.raises(error, match=message):
        prepare(config)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("tokens", ["-1", "0", "inf", "nan", "many"])
def test_prepare_refuses_invalid_number_of_tokens(corpus, tmp_path, capsys, tokens):
    before = everything(tmp_path)
    out = str(tmp_path / "new" / "data")
    assert main(["prepare", "--source", str(corpus), "--out", out, "--tokens", tokens]) != 0
    assert "tokens is" in capsys.readouterr().err
    assert everything(tmp_path) == before


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_prepare_refuses_a_file_that_is_not_a_tokenizer(corpus, tmp_path, content):
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    config = config_for(corpus, tmp_path / "new" / "data", tokenizer=str(file))
    refused(tmp_path, config, r"tokenizer\.json is not a tokenizer.*give a tokenizer\.json")


def test_prepare_refuses_a_missing_tokenizer(corpus, tmp_path):
    config = config_for(corpus, tmp_path / "data", tokenizer=str(tmp_path))
    refused(tmp_path, config, r"tokenizer\.json does not exist", FileNotFoundError)


def test_prepare_refuses_conversations_without_chat_tokens(corpus, tmp_path):
    content = json.loads(train_tokenizer(TEXTS, 300).to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if "header" not in token["content"]]
    content["model"]["vocab"] = {t: i for t, i in content["model"]["vocab"].items() if "header" not in t}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    config = PrepareConfig(
        out=str(tmp_path / "data"), sources=[SourceConfig("chats", str(corpus), chat_formatted=True)],
        tokenizer=str(tmp_path),
    )  # fmt: skip
    refused(tmp_path, config, r"lacks <\|begin_header\|>, <\|end_header\|>, which conversations need")


@pytest.mark.parametrize("name", ["data.unfinished", "data.unfinished/notes"])
def test_prepare_refuses_only_nonempty_foreign_unfinished_folder(corpus, tmp_path, name):
    (tmp_path / "data.unfinished").mkdir()
    if name.endswith("notes"):
        (tmp_path / name).write_text("mine")
        for restart in (False, True):
            config = config_for(corpus, tmp_path / "data", restart=restart)
            refused(tmp_path, config, r"data\.unfinished was not made by prepare.*move it away")
    else:  # an empty folder holds nothing to lose
        prepare(config_for(corpus, tmp_path / "data"))


def test_prepare_refuses_file_in_place_of_unfinished_folder(corpus, tmp_path):
    (tmp_path / "data.unfinished").write_text("mine")
    refused(tmp_path, config_for(corpus, tmp_path / "data"), r"data\.unfinished is a file")


@pytest.mark.parametrize("content", ["{", "[]", '{"options": 3, "parts": []}', "{}"])
def test_prepare_error_names_damaged_job_file(corpus, tmp_path, content):
    (tmp_path / "data.unfinished").mkdir()
    (tmp_path / "data.unfinished" / "job.json").write_text(content)
    with pytest.raises(DataError, match=r"job\.json is damaged.*--restart true"):
        prepare(config_for(corpus, tmp_path / "data"))
    prepare(config_for(corpus, tmp_path / "data", restart=True))


@pytest.mark.parametrize(
    ("missing", "changes", "message"),
    [
        ("ray", {"executor": "ray"}, r"executor ray needs the package ray.*pip install 'datatrove\[ray\]'"),
        ("datatrove", {"executor": "datatrove"}, r"needs the package datatrove.*pip install 'recurrent-depth\[data\]'"),
        ("datatrove", {"filters": FilterConfig(exact_duplicates=True)}, r"duplicates needs the package datatrove"),
        ("nothing", {"executor": "slurm"}, "sbatch, which is not on the PATH"),
    ],
)
def test_prepare_error_names_missing_package_or_program(corpus, tmp_path, monkeypatch, missing, changes, message):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setenv("PATH", "")
    refused(tmp_path, config_for(corpus, tmp_path / "data", **changes), message, UserError)


def test_prepare_error_names_package_for_hub_data_sets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    config = config_for("someone/corpus", tmp_path / "data")
    refused(tmp_path, config, r"someone/corpus is neither a file nor a folder.*pip install 'recurrent-depth\[data\]'")


def test_prepare_error_names_missing_file(tmp_path):
    config = config_for(tmp_path / "nothing.jsonl", tmp_path / "data")
    refused(tmp_path, config, r"nothing\.jsonl does not exist; fix the path", FileNotFoundError)


def test_prepare_refuses_a_missing_evaluation_set(corpus, tmp_path):
    filters = FilterConfig(evaluation_sets=[SourceConfig("e", str(tmp_path / "test.jsonl"))])
    config = config_for(corpus, tmp_path / "data", filters=filters)
    refused(tmp_path, config, r"test\.jsonl does not exist; fix the path", FileNotFoundError)


@pytest.mark.parametrize(
    ("lines", "changes", "message"),
    [
        ([" "], {}, "no text found"),
        ([json.dumps({"text": None})], {}, "no text found"),
        ([json.dumps({"text": text}) for text in TEXTS], {"sequence_length": 100_000}, "too few for one row"),
        (
            [json.dumps({"text": text}) for text in TEXTS],
            {"field": "body"},
            r"line 1: nothing in field 'body'.*--field",
        ),
        ([*[json.dumps({"text": text}) for text in TEXTS], "{"], {"tokenizer_documents": 1}, "line 61 is not JSON"),
        (['{"text": "a"}', "[" * 100_000], {}, "line 2 is not JSON"),
        (["[1]"], {}, "line 1 is not an object"),
    ],
)
def test_prepare_removes_its_folder_after_data_error(tmp_path, lines, changes, message):
    source = write_lines(tmp_path / "corpus.jsonl", lines)
    refused(tmp_path, config_for(source, tmp_path / "new" / "folder" / "data", **changes), message)


def test_prepare_error_lists_endings_in_folder_without_text_files(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.rst", "b.rst", "c.py", "README"):
        (folder / name).write_text("text")
    refused(
        tmp_path, config_for(folder, tmp_path / "data"), r"holds no file that ends in.*2 \.rst, 1 \.py, 1 no ending"
    )


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ResumableError("connection lost")])
def test_prepare_keeps_finished_tasks_after_external_failure(corpus, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(rows_module.pq, "write_table", fail)
        with pytest.raises(type(error)):
            prepare(config_for(corpus, tmp_path / "data"))
    assert list((tmp_path / "data.unfinished" / "rows").iterdir())
    prepare(config_for(corpus, tmp_path / "data"))
    assert not (tmp_path / "data.unfinished").exists()


def test_prepare_keeps_finished_tasks_when_options_change(corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("recurrent_depth.data.preparation.phases.write_parquet", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(config_for(corpus, tmp_path / "data"))
    with pytest.raises(DataError, match="other options"):
        prepare(config_for(corpus, tmp_path / "data", seed=1))
    assert list((tmp_path / "data.unfinished" / "rows").iterdir())


class TestTextFiles:
    @pytest.fixture
    def folder(self, tmp_path):
        folder = tmp_path / "texts"
        folder.mkdir()
        for number, text in enumerate(TEXTS):
            (folder / f"{number:02d}.txt").write_text(text)
        return folder

    def test_prepare_reports_skipped_files_and_invalid_utf8(self, folder, tmp_path, capsys):
        (folder / "latin.txt").write_bytes("déjà vu".encode("latin-1") + TEXTS[0].encode())
        (folder / "page.rst").write_text("text")
        (folder / "code.py").write_text("text")
        (folder / ".git").mkdir()
        (folder / ".git" / "object").write_text("x")
        manifest = prepare(config_for(folder, tmp_path / "data"))
        (source,) = manifest["sources"].values()
        assert source["documents_read"] == 61
        assert source["documents_not_utf8"] == 1
        assert source["files_skipped"] == {".rst": 1, ".py": 1}
        report, terminal = (tmp_path / "data" / "report.md").read_text(), capsys.readouterr().err
        assert "1 of 61 documents hold bytes that are not UTF-8" in report
        assert "not read: 1 .py, 1 .rst" in report
        assert "not read are 1 .py, 1 .rst" in terminal
        assert "1 of 61 documents hold bytes that are not UTF-8" in terminal

    def test_prepare_counts_replacement_characters_as_valid_utf8(self, folder, tmp_path):
        (folder / "decoded.txt").write_text("\ufffd " + TEXTS[0])
        (source,) = prepare(config_for(folder, tmp_path / "data"))["sources"].values()
        assert source["documents_not_utf8"] == 0

    @pytest.mark.parametrize("given", [False, True])
    def test_prepare_refuses_a_folder_in_another_encoding(self, folder, tmp_path, given):
        for number in range(10):
            (folder / f"{number:02d}.txt").write_bytes("déjà vu".encode("latin-1"))
        changes = {}
        if given:
            train_tokenizer(TEXTS, 400).save(str(tmp_path / "tokenizer.json"))
            changes["tokenizer"] = str(tmp_path)
        refused(
            tmp_path, config_for(folder, tmp_path / "data", **changes), "10 of 60 files are not UTF-8; convert them"
        )

    def test_source_folder_skips_pipes_folders_and_dangling_links(self, folder):
        os.mkfifo(folder / "pipe.txt")
        (folder / "folder.md").mkdir()
        (folder / "dangling.md").symlink_to(folder / "nothing")
        assert [document.text for document in read_documents(str(folder))] == TEXTS


class TestParquet:
    def test_parquet_null_and_empty_rows_are_counted_as_empty(self, tmp_path):
        file = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": [*TEXTS, None, "", " ", None]}), file, row_group_size=7)
        (source,) = prepare(config_for(file, tmp_path / "data"))["sources"].values()
        assert source["documents_read"] == len(TEXTS) + 4
        assert source["documents_dropped"]["empty"] == 4

    def test_parquet_file_without_rows_is_refused(self, tmp_path):
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
        refused(tmp_path, config_for(tmp_path / "a.parquet", tmp_path / "data"), "no text found")

    @pytest.mark.parametrize(
        ("column", "message"),
        [
            (pa.array([1, 2]), "no text in field 'text' but int"),
            (pa.array([b"a", b"b"]), "no text in field 'text' but bytes"),
            (pa.array([["a", "b"], [None]], pa.list_(pa.string())), "no text found|too few"),
            (pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")),
             r"a\.parquet cannot be read as parquet"),
        ],
        ids=["numbers", "bytes", "lists", "not-utf8"],
    )  # fmt: skip
    def test_parquet_column_without_text_is_refused(self, tmp_path, column, message):
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        refused(tmp_path, config_for(tmp_path / "a.parquet", tmp_path / "data"), message)

    def test_parquet_error_names_missing_and_existing_columns(self, tmp_path):
        pq.write_table(pa.table({"body": TEXTS}), tmp_path / "a.parquet")
        config = config_for(tmp_path / "a.parquet", tmp_path / "data")
        refused(tmp_path, config, r"none of the fields \['text'\] is a column \(it has \['body'\]\).*--field")

    def test_parquet_error_names_truncated_file(self, tmp_path):
        file = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": TEXTS}), file)
        file.write_bytes(file.read_bytes()[:-20])
        refused(tmp_path, config_for(file, tmp_path / "data"), r"a\.parquet cannot be read as parquet")
