"""Fine-tuning rows: labels on the reply only, dropped and cut examples counted, no attention across examples."""

import errno

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoning_rows import puzzles, write_rows
from recurrent_depth.data.config import DataConfig, PackedDataConfig
from recurrent_depth.data.layout import DataError
from recurrent_depth.data.loader import open_source
from recurrent_depth.data.tasks.puzzles import WORDS, puzzle_tokenizer
from recurrent_depth.reasoning.config import ReasoningDataConfig, ThinkingFormat
from recurrent_depth.reasoning.dataset import Tokens, lay_out, prepare_reasoning, tokenize
from recurrent_depth.reasoning.format import Formatter
from recurrent_depth.reasoning.pool import Example
from recurrent_depth.training.config import ValidationConfig
from recurrent_depth.training.launch import train
from support import losses, small_run

ID = {word: index for index, word in enumerate(WORDS)}


def test_reasoning_labels_cover_reply_without_unlearned_words():
    formatter = Formatter(puzzle_tokenizer(), ThinkingFormat())
    example = Example("0", "s", "cup1 swap01", "swap01 cup0 Wait swap01 cup0", "cup0")
    tokens = tokenize(formatter, example, unlearned=["Wait"])
    words = [WORDS[i] for i in tokens.ids]
    reply = words.index("<|begin_think|>")
    expected = [-100] * (reply - 1) + tokens.ids[reply:] + [-100]
    expected[words.index("Wait") - 1] = -100
    assert tokens.labels == expected
    assert expected.count(-100) < len(expected)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(2, 20), min_size=1, max_size=30), st.integers(20, 40))
def test_reasoning_packing_keeps_examples_whole(sizes, length):
    examples = [Tokens([100 + i] * size, [200 + i] * (size - 1) + [-100]) for i, size in enumerate(sizes)]
    rows = lay_out(examples, length, pad=7, pack=True)
    found = []
    for row in rows:
        assert len(row.input_ids) == length
        assert len(row.labels) == length - 1
        ends = [*row.doc_starts[1:], length]
        for start, end in zip(row.doc_starts, ends, strict=True):
            ids, labels = row.input_ids[start:end], row.labels[start:end]
            assert len(set(ids)) == 1
            if ids[0] == 7:
                assert set(labels) <= {-100}
            else:
                number = ids[0] - 100
                found.append((number, len(ids)))
                assert ([*labels, -100])[: len(ids)] == [100 + ids[0]] * (len(ids) - 1) + [-100]
    assert sorted(found) == list(enumerate(sizes))
    assert sum(sizes) > length * (len(rows) - 1) / 2


def test_packed_reasoning_rows_are_not_sorted_by_length():
    examples = [Tokens([1] * size, [1] * size) for size in range(2, 64) for _ in range(20)]
    longest = [max(np.diff([*row.doc_starts, 64])) for row in lay_out(examples, 64, pad=7, pack=True)]
    half = len(longest) // 2
    assert abs(np.mean(longest[:half]) - np.mean(longest[half:])) < 5  # sorted: 30


def test_packed_reasoning_loss_equals_sum_over_examples(tmp_path):
    config = ReasoningDataConfig(out=str(tmp_path / "data"), block=90, **write_rows(tmp_path / "in", puzzles(40)))
    manifest = prepare_reasoning(config)
    data = DataConfig(packed=PackedDataConfig(config.out, document_masking=True, restart_positions=True))
    source = open_source(data, "train", seed=0, total_steps=1)
    batch = source.batch(0, 2, 0)
    model = small_model()
    together = model(
        batch.input_ids, targets=batch.targets, num_steps=3,
        document_ids=batch.document_ids, position_ids=batch.position_ids,
    ).loss  # fmt: skip
    alone, examples = 0.0, 0
    for ids, targets, documents in zip(batch.input_ids, batch.targets, batch.document_ids, strict=True):
        for document in documents.unique():
            own = documents == document
            if (targets[own] != -100).any():
                alone += model(ids[own][None], targets=targets[own][None], num_steps=3).loss.item()
                examples += 1
    assert examples > 2
    assert together.item() == pytest.approx(alone, rel=1e-10)
    assert manifest["splits"]["train"]["documents"] + manifest["splits"]["validation"]["documents"] == 40


def small_model():
    from recurrent_depth.model.config import ModelConfig
    from recurrent_depth.model.transformer import RecurrentDepthModel

    model = RecurrentDepthModel(ModelConfig(n_embd=32, n_heads=2, intermediate_size=64, vocab_size=128)).double()
    model.initialise(seed=0)
    return model.eval()


def test_reasoning_rows_without_packing_hold_one_example(tmp_path):
    config = ReasoningDataConfig(str(tmp_path / "data"), pack=False, **write_rows(tmp_path / "in", puzzles(20)))
    manifest = prepare_reasoning(config)
    assert manifest["splits"]["train"]["rows"] == manifest["splits"]["train"]["documents"]
    source = open_source(DataConfig(packed=PackedDataConfig(config.out)), "train", seed=0, total_steps=1)
    assert ((source.batch(0, 5, 0).input_ids == ID["<|begin_think|>"]).sum(1) == 1).all()
    assert source.sequence_length == manifest["sequence_length"] < config.block


def test_reasoning_examples_longer_than_block_are_refused_dropped_or_cut(tmp_path, capsys):
    rows = puzzles(30, longest=4) + puzzles(3, longest=10, seed=5)
    whole = [len(row["question"].split()) + len(row["trace"].split()) + 14 for row in rows]
    block = 30
    beyond = sum(size > block for size in whole)
    assert 0 < beyond < 33
    inputs = write_rows(tmp_path / "in", rows)
    with pytest.raises(DataError, match=f"{beyond} of 33 examples are longer.*longest has {max(whole)}"):
        prepare_reasoning(ReasoningDataConfig(str(tmp_path / "a"), block=block, **inputs))
    assert not (tmp_path / "a").exists()
    dropped = prepare_reasoning(ReasoningDataConfig(str(tmp_path / "b"), block=block, when_too_long="drop", **inputs))
    assert dropped["not_trained_on"] == {"longer than the block": beyond}
    cut = prepare_reasoning(ReasoningDataConfig(str(tmp_path / "c"), block=block, when_too_long="cut", **inputs))
    assert cut["not_trained_on"] == {"trace cut to the block": beyond}
    assert sum(cut["splits"][name]["documents"] for name in ("train", "validation")) == 33
    source = open_source(DataConfig(packed=PackedDataConfig(str(tmp_path / "c"), document_masking=True)), "train", 0, 1)
    ids = source.batch(0, source.rows_per_epoch, 0).input_ids
    assert (ids == ID["<|end_think|>"]).sum() == cut["splits"]["train"]["documents"]
    assert "longer than the block: " in capsys.readouterr().err


def test_prepare_reasoning_counts_unusable_examples(tmp_path):
    rows = [*puzzles(10), {"question": "cup1 swap01", "answer": "cup0"}, {"question": "cup1", "trace": "x"}]
    rows.append({"question": "cup1 swap01", "trace": "swap01 <|end_think|> cup0", "answer": "cup0"})
    manifest = prepare_reasoning(ReasoningDataConfig(str(tmp_path / "data"), **write_rows(tmp_path / "in", rows)))
    assert manifest["not_trained_on"] == {"no answer": 1, "no trace": 1, "a delimiter inside the text": 1}


def test_prepare_reasoning_refuses_pool_without_usable_example(tmp_path):
    inputs = write_rows(tmp_path / "in", [{"question": "cup1 swap01", "answer": "cup0"}])
    with pytest.raises(DataError, match=r"no example is left of 1 .*no trace"):
        prepare_reasoning(ReasoningDataConfig(str(tmp_path / "data"), **inputs))


def test_prepare_reasoning_on_full_disk_leaves_no_folder(tmp_path, monkeypatch):
    inputs = write_rows(tmp_path / "in", puzzles(10))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match=r"No space left on device while writing .*data; free some space"):
        prepare_reasoning(ReasoningDataConfig(str(tmp_path / "new" / "data"), **inputs))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_prepare_reasoning_refuses_existing_folder(tmp_path):
    inputs = write_rows(tmp_path / "in", puzzles(10))
    prepare_reasoning(ReasoningDataConfig(str(tmp_path / "data"), **inputs))
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        prepare_reasoning(ReasoningDataConfig(str(tmp_path / "data"), **inputs))


@pytest.mark.slow
def test_fine_tuning_on_reasoning_rows_lowers_loss(tmp_path):
    config = ReasoningDataConfig(out=str(tmp_path / "data"), block=90, **write_rows(tmp_path / "in", puzzles(60)))
    prepare_reasoning(config)
    model = small_model().config
    data = DataConfig(packed=PackedDataConfig(config.out, document_masking=True, restart_positions=True))
    validation = ValidationConfig(every=100, rows=1, num_steps=(2,))
    run = train(small_run(tmp_path / "run", data=data, model=model, steps=20, validation=validation))
    values = losses(run)
    assert sum(values[-5:]) < 0.8 * sum(values[:5])
    assert (run / "tokenizer.json").is_file()
    assert torch.isfinite(torch.tensor(values)).all()
