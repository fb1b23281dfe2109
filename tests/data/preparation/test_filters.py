"""Document filters: planted duplicates, near duplicates and evaluation text are dropped and counted."""

import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from recurrent_depth.data.config import FilterConfig, PrepareConfig, SourceConfig
from recurrent_depth.data.preparation.command import prepare
from recurrent_depth.data.tokenizer import load_tokenizer

GSM8K = Path(__file__).parents[4] / "shared" / "data" / "gsm8k" / "test.jsonl"
WORDS = [a + b + c for a in "bdgklmnprst" for b in "aeiou" for c in ("", "n", "r", "s", "lo", "mi")]


def texts(count, seed=0, words=60):
    generator = random.Random(seed)
    return [f"Document {n}. " + " ".join(generator.choices(WORDS, k=words)) for n in range(count)]


def write(folder, documents, files=3):
    """Write the documents in order to a few JSONL files. Return the folder."""
    folder.mkdir()
    size = -(-len(documents) // files)
    for number in range(files):
        lines = [json.dumps({"text": text}) + "\n" for text in documents[number * size : (number + 1) * size]]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return folder


def dropped_and_kept(folder, tmp_path, filters, **changes):
    """Return (number of documents dropped by reason, texts that begin in a row)."""
    out = tmp_path / "data"
    options = {"vocab_size": 600, "sequence_length": 1000, "part_bytes": 12_000, "validation_share": 0.5} | changes
    manifest = prepare(PrepareConfig(out=str(out), source=[str(folder)], filters=filters, **options))
    tokenizer = load_tokenizer(out)
    found = []
    for split in ("train", "validation"):
        table = pq.read_table(out / split)
        for ids, starts in zip(*(table.column(name).to_pylist() for name in table.column_names), strict=True):
            found += [tokenizer.decode(ids[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
    (report,) = manifest["sources"].values()
    kept = sum(split["documents"] for split in manifest["splits"].values())
    assert report["documents_read"] == kept + sum(report["documents_dropped"].values())
    return report["documents_dropped"], found


def test_filters_drop_duplicates_across_files(tmp_path):
    documents = texts(180)
    documents[100] = documents[3]  # in another file
    documents[101] = documents[3]
    documents[150] = documents[40] + " and a new ending"
    documents[20] = " \n"
    folder = write(tmp_path / "texts", documents)
    dropped, found = dropped_and_kept(folder, tmp_path, FilterConfig(exact_duplicates=True, near_duplicates=True))
    assert dropped == {"empty": 1, "contaminated": 0, "exact_duplicate": 2, "near_duplicate": 1}
    assert len(set(found)) == len(found)
    assert sum(text.startswith(documents[40]) for text in found) <= 1


def test_near_duplicate_filter_alone_drops_exact_duplicates(tmp_path):
    documents = texts(60)
    documents[50] = documents[3]
    folder = write(tmp_path / "texts", documents)
    dropped, _ = dropped_and_kept(
        folder, tmp_path, FilterConfig(near_duplicates=True), sequence_length=500, part_bytes=10**6
    )
    assert dropped == {"empty": 0, "contaminated": 0, "exact_duplicate": 0, "near_duplicate": 1}


def test_duplicate_filters_keep_exercises_with_different_numbers(tmp_path):
    template = "Ann has {} apples and buys {} more, gives {} to Bob and eats {} of them; how many are left for the pie?"
    generator = random.Random(1)
    exercises = [template.format(*(generator.randint(100, 999) for _ in range(4))) for _ in range(100)]
    folder = write(tmp_path / "texts", exercises)
    filters = FilterConfig(exact_duplicates=True, near_duplicates=True)
    dropped, _ = dropped_and_kept(folder, tmp_path, filters, sequence_length=200, part_bytes=10**6)
    assert dropped == {"empty": 0, "contaminated": 0, "exact_duplicate": 0, "near_duplicate": 0}


@pytest.mark.skipif(not GSM8K.is_file(), reason="needs ../shared/data")
def test_decontamination_drops_documents_with_evaluation_questions(tmp_path):
    questions = [json.loads(line)["question"] for line in GSM8K.read_text().splitlines()]
    planted = {7: questions[11], 90: questions[500].upper(), 130: "A.\n\n" + "\n".join(questions[1000].split(" "))}
    documents = texts(150)
    for place, question in planted.items():
        documents[place] += " " + question + " The end."
    folder = write(tmp_path / "texts", documents)
    evaluation = SourceConfig(name="gsm8k", address=str(GSM8K), fields=["question", "answer"])
    dropped, found = dropped_and_kept(
        folder, tmp_path, FilterConfig(evaluation_sets=[evaluation], ngram_words=13), sequence_length=1000
    )
    assert dropped == {"empty": 0, "contaminated": 3, "exact_duplicate": 0, "near_duplicate": 0}
    assert not any(text.endswith("The end.") for text in found)
