"""Category shares and passes of a data mix. The shipped Huginn mix runs with small generated sources."""

import dataclasses
import functools
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recurrent_depth.data.config import FilterConfig, PrepareConfig, SourceConfig
from recurrent_depth.data.layout import DataError
from recurrent_depth.data.preparation.command import prepare
from recurrent_depth.data.preparation.mix import chosen_rows, passes, row_copies, rows_of_file
from recurrent_depth.data.tokenizer import load_tokenizer
from recurrent_depth.parsing import parse_options

CONFIGS = sorted(Path(__file__).parents[3].glob("configs/data/*_mix.yaml"))
PUBLISHED = {
    "generic-text": 28.71, "code": 25.36, "scientific-text": 18.73, "synthetic-text": 8.14, "longform-text": 7.50,
    "math": 6.14, "generic-instruct": 2.09, "Q&A-text": 1.58, "math-instruct": 1.51, "writing-instruct": 0.12,
    "misc-reasoning": 0.11,
}  # fmt: skip


@functools.cache
def load(path):
    return parse_options(PrepareConfig, ["--config", str(path), "--out", "out"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_mix_parses(path):
    assert load(path).all_sources


def test_huginn_mix_has_published_sources_and_shares():
    config = load(next(path for path in CONFIGS if path.stem == "huginn_mix"))
    assert len(config.sources) == 113
    assert config.category_shares == PUBLISHED
    assert {source.category for source in config.sources} == set(PUBLISHED)
    assert (config.vocab_size, config.sequence_length, config.policy) == (65536, 4096, "huginn")
    assert sum(source.keep_document_rests for source in config.sources) == 11


def stand_in(source, number, folder, generator):
    """Write a small JSONL file with the fields of `source`. Return the source with the path of this file.

    Every text contains the number of the source. Files differ in rows, up to tenfold.
    """
    rows = []
    for row in range(generator.randint(4, 40)):
        text = f"row{row} " + f"source{number}. " * generator.randint(5, 60)
        record = {name: text for choice in source.fields for name in choice.split("/")[:1]}
        if source.fields in (["messages"], ["conversations"]):
            record = {source.fields[0]: [{"from": "human", "value": "say it"}, {"from": "gpt", "value": text}]}
        rows.append(json.dumps(record))
    file = folder / f"{number:03d}.jsonl"
    file.write_text("\n".join(rows) + "\n")
    return dataclasses.replace(source, address=str(file), subset=None)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Return (folder, configuration, manifest) of the Huginn mix with generated sources."""
    tmp_path, generator = tmp_path_factory.mktemp("mix"), random.Random(0)
    mix = load(next(path for path in CONFIGS if path.stem == "huginn_mix"))
    sources = [stand_in(source, number, tmp_path, generator) for number, source in enumerate(mix.sources)]
    config = dataclasses.replace(
        mix, out=str(tmp_path / "data"), sources=sources, filters=FilterConfig(), vocab_size=1024, sequence_length=64,
        tokens=65 * 12_000, files=3, validation_share=0.2,
    )  # fmt: skip
    return tmp_path / "data", config, prepare(config)


def counted_rows(folder):
    """Return the number of rows per source, counted in the decoded text."""
    tokenizer = load_tokenizer(folder)
    found = Counter()
    for row in pq.read_table(folder / "train").column("input_ids").to_pylist():
        text = tokenizer.decode(row, skip_special_tokens=True)
        numbers = [word.split(".")[0] for word in text.split("source")[1:-1]]
        found[int(Counter(numbers).most_common(1)[0][0])] += 1
    return found


def test_huginn_mix_rows_match_published_category_shares(prepared):
    folder, config, manifest = prepared
    rows = counted_rows(folder)
    total = rows.total()
    by_category = Counter()
    for number, count in rows.items():
        by_category[config.sources[number].category] += count
    for category, percent in PUBLISHED.items():
        share = by_category[category] / total
        assert share == pytest.approx(percent / sum(PUBLISHED.values()), rel=0.01, abs=1 / total)
        assert share == pytest.approx(manifest["categories"][category]["share"], abs=1e-12)
    assert total == pytest.approx(12_000, abs=len(PUBLISHED))


def test_source_weights_set_relative_passes_within_a_category(prepared):
    folder, config, manifest = prepared
    reports = manifest["sources"]
    rows = counted_rows(folder)
    for number, source in enumerate(config.sources):
        report = reports[source.name]
        first = next(other for other in config.sources if other.category == source.category)
        assert report["passes"] / reports[first.name]["passes"] == pytest.approx(source.weight / first.weight)
        assert rows[number] == report["splits"]["train"]["final_rows"]
        assert abs(rows[number] - report["passes"] * report["splits"]["train"]["rows"]) < 1
    text = (folder / "report.md").read_text()
    assert all(f"| {source.name} |" in text for source in config.sources)


def test_mix_files_have_equal_size_and_interleave_sources(prepared):
    folder, _, manifest = prepared
    sizes = [len(pq.read_table(file)) for file in sorted((folder / "train").glob("*.parquet"))]
    assert len(sizes) == 3
    assert max(sizes) - min(sizes) <= 1
    tokenizer = load_tokenizer(folder)
    first = pq.read_table(folder / "train" / "part-00000.parquet").column("input_ids").to_pylist()[:200]
    assert len({tokenizer.decode(row).split("source")[1].split(".")[0] for row in first}) > 20
    assert manifest["splits"]["validation"]["rows"] > 0


def sources(*weights_and_categories):
    return [
        SourceConfig(name=f"s{n}", address="x", weight=weight, category=category)
        for n, (weight, category) in enumerate(weights_and_categories)
    ]


def test_mix_without_target_limits_passes_to_weights():
    mix = sources((1, "a"), (4, "a"), (2, "b"))
    factors = passes(mix, [100, 10, 1000], {"a": 50, "b": 50}, None)
    assert factors == pytest.approx([1, 4, 0.14])  # 140 rows of a are the bottleneck, so 140 of b
    assert passes(mix, [100, 10, 1000], {}, None) == [1, 4, 2]
    assert passes(mix, [100, 10, 1000], {}, 214) == pytest.approx([0.1, 0.4, 0.2])


def test_mix_refuses_category_without_rows():
    with pytest.raises(DataError, match="'b'"):
        passes(sources((1, "a"), (1, "b")), [5, 0], {"a": 1, "b": 1}, None)


@settings(deadline=None)
@given(
    rows=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    quarters=st.lists(st.integers(0, 12), min_size=8, max_size=8),
    files=st.integers(1, 4),
)
def test_mix_takes_each_row_as_often_as_planned(rows, quarters, files):
    factors = [quarters[part] / 4 for part in range(len(rows))]
    copies = row_copies(rows, factors, ["one"] * len(rows))
    assert abs(sum(copies) - sum(n * f for n, f in zip(rows, factors, strict=True))) <= 0.5 + max(factors, default=0)
    dealt = [rows_of_file(rows, copies, [7, 0], files, file) for file in range(files)]
    for part, (count, number) in enumerate(zip(rows, copies, strict=True)):
        taken = Counter(int(row) for file in dealt for p, chosen in file if p == part for row in chosen)
        assert taken.total() == number
        assert all(taken[row] in (number // count, number // count + 1) for row in range(count))
    sizes = [sum(len(chosen) for _, chosen in file) for file in dealt]
    assert max(sizes) - min(sizes) <= 1


def test_mix_passes_have_different_row_orders():
    order = chosen_rows(50, 100, np.random.default_rng(0))
    assert sorted(order[:50]) == sorted(order[50:]) == list(range(50))
    assert list(order[:50]) != list(order[50:])


def test_mix_refuses_inconsistent_options():
    with pytest.raises(ValueError, match=r"s1.*'b'"):
        PrepareConfig(out="o", sources=sources((1, "a"), (1, "b")), category_shares={"a": 1.0})
    with pytest.raises(ValueError, match="twice"):
        PrepareConfig(out="o", sources=sources((1, "a")) * 2)
    with pytest.raises(ValueError, match="weight"):
        sources((0, "a"))
