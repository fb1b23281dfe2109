"""Reading of pools: field maps, file formats and incomplete rows."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reasoning.curation.rows import example
from recurrent_depth.data.layout import DataError
from recurrent_depth.reasoning.config import SourceConfig
from recurrent_depth.reasoning.pool import COLUMNS, SCHEMA, load_pool, read_examples, split_gsm8k, to_table

GSM8K = "She pays 3*4=<<3*4=12>>12 dollars.\nSo 12+1=<<12+1=13>>13.\n#### 13"


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_pool_maps_fields_through_lists_and_objects(tmp_path):
    records = [
        {"problem": " Q1 ", "solutions": [{"text": "T1"}, {"text": "no"}], "gold": 7, "kind": "algebra", "ok": True},
        {"problem": "Q2", "solutions": [], "gold": 0.5},
    ]
    fields = {
        "question": "problem",
        "trace": "solutions.0.text",
        "answer": "gold",
        "domain": "kind",
        "trace_correct": "ok",
    }
    rows, drops = load_pool([SourceConfig(write_jsonl(tmp_path / "a.jsonl", records), fields=fields)])
    assert not drops
    assert [(r.id, r.source, r.question, r.trace, r.answer, r.domain, r.trace_correct) for r in rows] == [
        ("a/0", "a", "Q1", "T1", "7", "algebra", True),
        ("a/1", "a", "Q2", "", "0.5", None, None),
    ]


def test_pool_reads_sources_of_several_formats_in_order(tmp_path):
    records = [{"question": f"Q{i}", "answer": str(i), "source": "AIME" if i else None} for i in range(3)]
    folder = tmp_path / "parts"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(records[:1]), folder / "a.parquet")
    write_jsonl(folder / "b.jsonl", records[1:])
    sources = [SourceConfig("parts", limit=2), SourceConfig("parts/b.jsonl", name="again")]
    rows, _ = load_pool(sources, tmp_path)
    assert [(row.id, row.source) for row in rows] == [
        ("parts/0", "parts"), ("parts/1", "AIME"), ("again/0", "AIME"), ("again/1", "AIME"),
    ]  # fmt: skip


def test_pool_reads_a_hub_data_set(tmp_path, monkeypatch):
    import datasets

    calls = []

    def load(name, subset, split, revision, streaming):
        calls.append((name, subset, split, streaming))
        return iter([{"question": "Q", "answer": GSM8K}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows, _ = load_pool([SourceConfig("openai/gsm8k:main", split="test", answer_format="gsm8k")])
    assert calls == [("openai/gsm8k", "main", "test", True)]
    assert (rows[0].id, rows[0].answer) == ("gsm8k/0", "13")


def test_gsm8k_answer_is_split_into_trace_and_number():
    assert split_gsm8k(GSM8K) == ("She pays 3*4=12 dollars.\nSo 12+1=13.", "13")
    assert split_gsm8k(GSM8K, keep_calculator_marks=True)[0].startswith("She pays 3*4=<<3*4=12>>12 dollars")
    assert split_gsm8k("no mark") == ("no mark", "")


def test_pool_drops_incomplete_rows_with_reason(tmp_path):
    records = [
        {"question": "Q", "answer": GSM8K},
        {"answer": GSM8K},
        {"question": "  ", "answer": GSM8K},
        {"question": "Q", "answer": None},
        {"question": "Q", "answer": "thirteen"},
        {"question": ["Q"], "answer": GSM8K},
    ]
    source = SourceConfig(write_jsonl(tmp_path / "a.jsonl", records), answer_format="gsm8k")
    rows, drops = load_pool([source])
    assert [row.id for row in rows] == ["a/0"]
    assert [(drop.example.id, drop.reason) for drop in drops] == [
        ("a/1", "no question"), ("a/2", "no question"), ("a/3", "no answer"), ("a/4", "no final answer (####)"),
        ("a/5", "no question"),
    ]  # fmt: skip


class TestPoolErrors:
    def test_pool_error_names_fields_of_source(self, tmp_path):
        file = write_jsonl(tmp_path / "a.jsonl", [{"problem": "Q", "answer": "1"}])
        with pytest.raises(DataError, match=r"no question.*\['answer', 'problem'\].*fields"):
            load_pool([SourceConfig(file)])

    def test_pool_field_map_refuses_unknown_column(self):
        with pytest.raises(ValueError, match=r"\['prompt'\].*question"):
            SourceConfig("a.jsonl", fields={"prompt": "problem"})

    def test_pool_error_names_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl.*--root"):
            load_pool([SourceConfig("nothing.jsonl")], tmp_path)

    @pytest.mark.parametrize(("line", "message"), [("{", "line 2 is not JSON"), ("[1]", "line 2 is not an object")])
    def test_pool_error_names_damaged_line(self, tmp_path, line, message):
        (tmp_path / "a.jsonl").write_text('{"question": "Q", "answer": "1"}\n' + line + "\n")
        with pytest.raises(DataError, match=message):
            load_pool([SourceConfig("a.jsonl")], tmp_path)

    def test_pool_error_names_truncated_parquet_file(self, tmp_path):
        file = tmp_path / "a.parquet"
        pq.write_table(pa.table({"question": ["Q"], "answer": ["1"]}), file)
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(DataError, match=r"a\.parquet cannot be read as parquet"):
            load_pool([SourceConfig(str(file))])

    def test_pool_refuses_duplicate_id(self, tmp_path):
        file = write_jsonl(tmp_path / "a.jsonl", [{"id": "x", "question": "Q", "answer": "1"}] * 2)
        with pytest.raises(DataError, match="'a/x' occurs twice"):
            load_pool([SourceConfig(file)])


def test_pool_examples_round_trip_through_parquet(tmp_path):
    assert tuple(SCHEMA.names) == COLUMNS
    rows = [example(0), example(1, trace_correct=False, domain="d", trace_tokens=3, picked="seed", trace_answer="2")]
    pq.write_table(to_table(rows), tmp_path / "examples.parquet")
    assert read_examples(tmp_path) == rows
    pq.write_table(pa.table({"question": ["Q"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="lacks the columns"):
        read_examples(tmp_path / "other.parquet")
