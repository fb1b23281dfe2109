"""Checkpoints are whole or absent, and damage is named."""

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recurrent_depth.data.config import DataConfig, PackedDataConfig
from recurrent_depth.runs import CheckpointError, checkpoints, find_checkpoint, load_run_model
from recurrent_depth.training.config import CheckpointConfig, OptimizerConfig
from recurrent_depth.training.launch import train
from recurrent_depth.training.parallel import build_model
from recurrent_depth.training.trainer import Trainer
from support import ONE_RANK, losses, small_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "finished"
    train(small_run(run))
    return run


def copy_run(source, target):
    import shutil

    shutil.copytree(source, target)
    return target


def test_old_checkpoints_are_pruned(tmp_path):
    config = small_run(tmp_path / "run", checkpoint=CheckpointConfig(every=2, keep_last=2, keep_every=6))
    train(config)
    assert [int(p.name[5:]) for p in checkpoints(tmp_path / "run")] == [6, 10, 12]


def test_a_trained_model_is_read_back(finished):
    model = load_run_model(finished)
    fresh = build_model(model.config, small_run(finished).runtime, ONE_RANK, seed=0)
    assert not torch.equal(model.transformer.adapter.weight, fresh.transformer.adapter.weight)
    trainer = Trainer(small_run(finished), ONE_RANK)
    trainer.resume(find_checkpoint(finished))
    for (name, a), (_, b) in zip(model.named_parameters(), trainer.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_and_named(finished, tmp_path, damage):
    run = copy_run(finished, tmp_path / "run")
    shard = next(find_checkpoint(run).glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    if damage == "remove":
        shard.unlink()
    elif damage == "truncate":
        shard.write_bytes(content[: len(content) // 2])
    else:
        content[-1] ^= 1
        shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=shard.name):
        load_run_model(run)
    with pytest.raises(CheckpointError, match=shard.name):
        train(small_run(run), resume=True)


def test_another_shape_is_refused(finished, tmp_path):
    run = copy_run(finished, tmp_path / "run")
    config = small_run(run)
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, n_embd=48))
    with pytest.raises(CheckpointError, match="n_embd"):
        train(wider, resume=True)
    trainer = Trainer(wider, ONE_RANK)
    with pytest.raises(CheckpointError, match="n_embd: saved 32, now 48"):
        trainer.resume(find_checkpoint(run))


def test_another_optimizer_or_other_data_are_refused(finished, tmp_path):
    run = copy_run(finished, tmp_path / "run")
    with pytest.raises(CheckpointError, match="optimizer"):
        train(small_run(run, optimizer=OptimizerConfig(name="adamw")), resume=True)
    details = find_checkpoint(run) / "checkpoint.json"
    record = json.loads(details.read_text())
    details.write_text(json.dumps(record | {"data": "something else"}))
    with pytest.raises(CheckpointError, match="accept-changed-data"):
        train(small_run(run), resume=True)
    train(small_run(run), resume=True, accept_changed_data=True)


def write_rows(folder, first):
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        rows = [[(first + 7 * i + j) % 50 for j in range(9)] for i in range(16)]
        pq.write_table(pa.table({"input_ids": rows}), folder / split / "rows.parquet")
        (folder / "manifest.json").write_text(json.dumps({"vocab_size": 50, "content": f"rows from {first}"}))


def test_packed_rows_that_changed_are_refused(tmp_path):
    write_rows(tmp_path / "data", 0)
    config = small_run(tmp_path / "run", data=DataConfig(packed=PackedDataConfig(str(tmp_path / "data"))))
    train(dataclasses.replace(config, max_hours=1e-9))
    write_rows(tmp_path / "data", 1)
    with pytest.raises(CheckpointError, match="accept-changed-data"):
        train(config, resume=True)
    assert len(losses(tmp_path / "run")) == 1
    write_rows(tmp_path / "data", 0)
    train(config, resume=True)
    assert len(losses(tmp_path / "run")) == 12


def test_a_finished_run_is_not_overwritten(finished):
    before = losses(finished)
    with pytest.raises(FileExistsError, match="resume"):
        train(small_run(finished))
    assert losses(finished) == before


def test_a_run_without_checkpoint_says_so(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load_run_model(tmp_path)
