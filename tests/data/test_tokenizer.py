"""Tokenizer training: bounded word length in text without spaces, plain BPE otherwise. Errors of invalid files."""

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from recurrent_depth.data.config import FilterConfig, PrepareConfig
from recurrent_depth.data.layout import DataError
from recurrent_depth.data.preparation.command import prepare
from recurrent_depth.data.tokenizer import SPECIAL_TOKENS, load_tokenizer, train_tokenizer
from recurrent_depth.parsing import parse_options

HUGINN_MIX = Path(__file__).parents[2] / "configs" / "data" / "huginn_mix.yaml"

TEXTS = [f"Document {i}: hello there, {i * i} times.\n\n    indented()" for i in range(200)]


def reference(texts, vocab_size):
    """Return a BPE tokenizer trained without any preprocessing of the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "", "漢字かな交じり文、句読点まで。" * 300, "naïve café Ωmega " * 100, "a-b_c " * 900, "| - | - |\n" * 400,
        "    deep\n" * 500, "a" * 999, "12,345.67 " * 300,
    ],
    ids=["empty", "cjk", "accents", "marks", "table", "indentation", "longest-word", "numbers"],
)  # fmt: skip
def test_tokenizer_training_equals_plain_bpe_on_ordinary_text(text):
    texts = [*TEXTS, text]
    assert train_tokenizer(texts, 500).to_str() == reference(texts, 500).to_str()


@pytest.mark.parametrize("run", ["a" * 40_000, "7" * 40_000, " " * 40_000, "=-" * 20_000, "漢" * 20_000, "é1" * 20_000])
def test_tokenizer_training_bounds_word_length(run):
    """BPE's training time is quadratic in the longest word: 400,000 letters would take minutes."""
    tokenizer = train_tokenizer([*TEXTS, f"before {run} after"], 400)
    assert max(map(len, tokenizer.get_vocab())) <= 3 * 1000  # bytes of 1,000 characters
    text = f"before {run} after"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_training_refuses_too_small_vocabulary():
    with pytest.raises(ValueError, match="vocab_size is 100; it must be at least 288"):
        train_tokenizer(TEXTS, 100)


def test_tokenizer_error_names_invalid_file(tmp_path):
    whole = train_tokenizer(TEXTS, 300).to_str().encode()
    file = tmp_path / "tokenizer.json"
    contents = [b"", b"{", b"[]", b"{}", b'{"model": 3}', b"\xff\xfe\x00", b"null", b'"text"', b"[" * 100_000]
    contents += [whole[: len(whole) * part // 7] for part in range(1, 7)]
    for content in contents:
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer"):
            load_tokenizer(file)


def test_tokenizer_round_trip_keeps_any_text():
    tokenizer = train_tokenizer(TEXTS, 300)
    for text in ("naïve — 漢字 🙂", "tabs\tand\nlines\r\n", "".join(map(chr, range(32, 1000)))):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert len(SPECIAL_TOKENS) >= 32


@pytest.mark.slow
def test_tokenizer_of_65536_entries_fits_16_bits(tmp_path):
    """Train 65,536 entries on the source of torch. All ids, special tokens included, fit 16 bits."""
    files = sorted(Path(torch.__file__).parent.rglob("*.py"))
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
