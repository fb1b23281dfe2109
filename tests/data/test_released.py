"""Huginn's released rows: 4,097 tokens, one column, no manifest, from a folder or by name from the hub."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recurrent_depth.data.config import DataConfig, PackedDataConfig
from recurrent_depth.data.layout import DataError
from recurrent_depth.data.loader import open_source
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.training.config import OptimizerConfig, ValidationConfig
from recurrent_depth.training.launch import train
from support import losses, small_run

NAME = "somebody/huginn-rows"


def write(folder, row_length=4097):
    """Write two training files and one validation file. Token ids count upwards modulo 64."""
    for split, files in (("train", 2), ("validation", 1)):
        (folder / split).mkdir(parents=True)
        for file in range(files):
            rows = (np.arange(row_length)[None] + 5 * np.arange(6)[:, None] + file) % 64
            ids = pa.array(rows.astype(np.uint32).tolist(), pa.list_(pa.uint32()))
            pq.write_table(pa.table({"input_ids": ids}), folder / split / f"{file:05d}.parquet")
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Write a data set in the layout of huggingface_hub's cache. Return its snapshot folder."""
    import huggingface_hub.constants

    repository = tmp_path / "hub" / ("datasets--" + NAME.replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return write(repository / "snapshots" / ("a" * 40))


def run_config(tmp_path, path):
    model = ModelConfig(
        n_embd=16, n_heads=2, intermediate_size=32, vocab_size=64, block_size=4096, mean_recurrence=1,
        mean_backprop_depth=1,
    )  # fmt: skip
    return small_run(
        tmp_path / "run", data=DataConfig(packed=PackedDataConfig(path)), model=model, steps=2, batch_size=1,
        micro_steps=1, optimizer=OptimizerConfig(cooldown_steps=1),
        validation=ValidationConfig(every=2, rows=1, num_steps=(1,)),
    )  # fmt: skip


def test_training_reads_released_rows_from_folder(tmp_path):
    write(tmp_path / "rows")
    train(run_config(tmp_path, str(tmp_path / "rows")))
    assert len(losses(tmp_path / "run")) == 2
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(record["type"] == "validation" for record in records)


def test_released_rows_are_equal_from_hub_and_folder(hub, tmp_path):
    local = write(tmp_path / "rows")
    for split in ("train", "validation"):
        expected = open_source(DataConfig(packed=PackedDataConfig(str(local))), split, 3, 1).batch(0, 6, 0)
        found = open_source(DataConfig(packed=PackedDataConfig(NAME)), split, 3, 1).batch(0, 6, 0)
        assert torch.equal(found.input_ids, expected.input_ids)
        assert found.input_ids.shape == (6, 4096)
    pinned = open_source(DataConfig(packed=PackedDataConfig(NAME, revision="a" * 40)), "train", 3, 1)
    assert pinned.rows_per_epoch == 12


def test_released_rows_download_only_requested_split(hub, tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def download(name, **options):
        asked[name] = options
        return str(hub)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    open_source(DataConfig(packed=PackedDataConfig(NAME, revision="v1")), "train", 0, 1)
    assert asked == {
        NAME: {
            "repo_type": "dataset",
            "revision": "v1",
            "allow_patterns": ["train/*", "manifest.json", "tokenizer.json"],
        }
    }


def test_released_rows_error_names_unknown_path_or_missing_split(hub):
    with pytest.raises(DataError, match=r"nobody/nothing is neither a folder nor a data set"):
        open_source(DataConfig(packed=PackedDataConfig("nobody/nothing")), "train", 0, 1)
    shutil.rmtree(hub / "validation")
    with pytest.raises(DataError, match="validation_path"):
        open_source(DataConfig(packed=PackedDataConfig(NAME)), "validation", 0, 1)


def test_released_rows_error_names_truncated_file_or_missing_column(tmp_path):
    folder = write(tmp_path / "rows")
    second = folder / "train" / "00001.parquet"
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"00001\.parquet is not a whole parquet file"):
        open_source(DataConfig(packed=PackedDataConfig(str(folder))), "train", 0, 1)
    pq.write_table(pa.table({"tokens": [[1, 2]]}), second)
    (folder / "train" / "00000.parquet").unlink()
    with pytest.raises(DataError, match=r"00001\.parquet has no column input_ids"):
        open_source(DataConfig(packed=PackedDataConfig(str(folder))), "train", 0, 1)
