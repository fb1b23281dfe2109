"""Checkpoints are complete or absent, damage is named, and a resume refuses changed configurations."""

import dataclasses
import hashlib
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from recurrent_depth.data.config import DataConfig, PackedDataConfig
from recurrent_depth.runs import CheckpointError, checkpoints, find_checkpoint, load_run_model, read_details
from recurrent_depth.training.config import CheckpointConfig, OptimizerConfig, ValidationConfig
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


def test_checkpoints_beyond_the_limits_are_removed(tmp_path):
    config = small_run(tmp_path / "run", checkpoint=CheckpointConfig(every=2, keep_last=2, keep_every=6))
    train(config)
    assert [int(p.name[5:]) for p in checkpoints(tmp_path / "run")] == [6, 10, 12]


def test_checkpoint_loads_the_trained_weights(finished):
    model = load_run_model(finished)
    fresh = build_model(model.config, small_run(finished).runtime, ONE_RANK, seed=0)
    assert not torch.equal(model.transformer.adapter.weight, fresh.transformer.adapter.weight)
    trainer = Trainer(small_run(finished), ONE_RANK)
    trainer.resume(find_checkpoint(finished), read_details(find_checkpoint(finished)))
    for (name, a), (_, b) in zip(model.named_parameters(), trainer.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "add"])
def test_checkpoint_damage_is_named(finished, tmp_path, damage):
    run = copy_run(finished, tmp_path / "run")
    shard = next(find_checkpoint(run).glob("model/*.safetensors"))
    content = bytearray(shard.read_bytes())
    if damage == "remove":
        shard.unlink()
    elif damage == "add":  # a file without a checksum, which a reader would include
        shard = shard.with_name("zzz.safetensors")
        shard.write_bytes(content)
    elif damage == "truncate":
        shard.write_bytes(content[: len(content) // 2])
    else:
        content[-1] ^= 1
        shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=shard.name):
        load_run_model(run)
    with pytest.raises(CheckpointError, match=shard.name):
        train(small_run(run), resume=True)


def test_checkpoint_moments_are_verified_only_by_a_resume(finished, tmp_path):
    run = copy_run(finished, tmp_path / "run")
    (shard,) = find_checkpoint(run).glob("optimizer/*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"optimizer/.* is damaged"):
        train(small_run(run), resume=True)
    shard.unlink()
    expected = load_run_model(finished).state_dict()
    for name, value in load_run_model(run).state_dict().items():
        assert torch.equal(value, expected[name]), name


def with_checksum(run, file):
    """Update the checksum of a changed file in checkpoint.json."""
    path = find_checkpoint(run) / "checkpoint.json"
    details = json.loads(path.read_text())
    details["files"][file.relative_to(path.parent).as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()
    path.write_text(json.dumps(details))


@pytest.mark.parametrize("part", ["model", "optimizer"])
@pytest.mark.parametrize("damage", ["header", "pickle", "empty", "another tensor"])
def test_checkpoint_file_with_wrong_tensors_is_named_despite_a_right_checksum(finished, tmp_path, part, damage):
    run = copy_run(finished, tmp_path / "run")
    (shard,) = find_checkpoint(run).glob(f"{part}/*.safetensors")
    content = shard.read_bytes()
    if damage == "header":
        shard.write_bytes(content[:40] + b"\xff" * 40 + content[80:])
    elif damage == "pickle":
        shard.write_bytes(pickle.dumps({"weight": 1}))
    elif damage == "empty":
        shard.write_bytes(b"")
    else:
        save_file({"something": torch.zeros(3)}, shard)
    with_checksum(run, shard)
    with pytest.raises(CheckpointError, match=f"step-00000012/{part} is damaged or lacks tensors"):
        train(small_run(run), resume=True)
    if part == "model":
        with pytest.raises(CheckpointError, match=f"step-00000012/{part} is damaged or lacks tensors"):
            load_run_model(run)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("trajectory", None), ("files", None), ("model", None), ("step", None), ("data", None), ("steps", "twelve"),
        ("last_losses", {}), ("health", None), ("files", ["model"]), ("model", {"n_embd": 0}),
        ("model", {"nonsense": 1}),
    ],
)  # fmt: skip
def test_checkpoint_json_without_a_field_names_the_field(finished, tmp_path, field, value):
    run = copy_run(finished, tmp_path / "run")
    path = find_checkpoint(run) / "checkpoint.json"
    details = json.loads(path.read_text())
    details = details | {field: value} if value is not None else {k: v for k, v in details.items() if k != field}
    path.write_text(json.dumps(details))
    with pytest.raises(CheckpointError, match=field if field != "model" else "model|n_embd|nonsense"):
        train(small_run(run), resume=True)
    if field in ("files", "model", "step"):
        with pytest.raises(CheckpointError, match=field if field != "model" else "model|n_embd|nonsense"):
            load_run_model(run)


@pytest.mark.parametrize("content", ["", "[]", "{", "null", "\xff"])
def test_checkpoint_json_damage_is_named(finished, tmp_path, content):
    run = copy_run(finished, tmp_path / "run")
    path = find_checkpoint(run) / "checkpoint.json"
    path.write_bytes(content.encode("latin-1"))
    for action in (load_run_model, lambda run: train(small_run(run), resume=True)):
        with pytest.raises(CheckpointError, match=r"step-00000012/checkpoint\.json"):
            action(run)


def test_resume_refuses_another_model_shape(finished, tmp_path):
    run = copy_run(finished, tmp_path / "run")
    config = small_run(run)
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, n_embd=48))
    with pytest.raises(CheckpointError, match="n_embd"):
        train(wider, resume=True)
    trainer = Trainer(wider, ONE_RANK)
    with pytest.raises(CheckpointError, match="n_embd: saved 32, now 48"):
        trainer.resume(find_checkpoint(run), read_details(find_checkpoint(run)))


def test_resume_refuses_another_optimizer_and_other_data(finished, tmp_path):
    run = copy_run(finished, tmp_path / "run")
    with pytest.raises(CheckpointError, match="optimizer"):
        train(small_run(run, optimizer=OptimizerConfig(name="adamw")), resume=True)
    details = find_checkpoint(run) / "checkpoint.json"
    record = json.loads(details.read_text())
    details.write_text(json.dumps(record | {"data": "something else"}))
    with pytest.raises(CheckpointError, match="accept-changed-data"):
        train(small_run(run), resume=True)
    train(small_run(run), resume=True, accept_changed_data=True)


def write_rows(folder, first, manifest=False):
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        rows = [[(first + 7 * i + j) % 50 for j in range(9)] for i in range(16)]
        pq.write_table(pa.table({"input_ids": rows}), folder / split / "rows.parquet")
    if manifest:
        (folder / "manifest.json").write_text(json.dumps({"vocab_size": 50, "content": "the same"}))


@pytest.mark.parametrize("manifest", [True, False])
def test_resume_refuses_changed_packed_rows_but_not_a_moved_folder(tmp_path, manifest):
    """The changed rows have the same names, shapes and number, and the manifest is unchanged."""
    write_rows(tmp_path / "data", 0, manifest)
    config = small_run(tmp_path / "run", data=DataConfig(packed=PackedDataConfig(str(tmp_path / "data"))))
    train(dataclasses.replace(config, max_hours=1e-9))
    write_rows(tmp_path / "data", 1, manifest)
    with pytest.raises(CheckpointError, match="accept-changed-data"):
        train(config, resume=True)
    assert len(losses(tmp_path / "run")) == 1
    write_rows(tmp_path / "moved", 0, manifest)
    train(dataclasses.replace(config, data=DataConfig(packed=PackedDataConfig(str(tmp_path / "moved")))), resume=True)
    assert len(losses(tmp_path / "run")) == 12


def test_training_refuses_more_validation_rows_than_exist(tmp_path):
    write_rows(tmp_path / "data", 0)
    config = small_run(tmp_path / "run", data=DataConfig(packed=PackedDataConfig(str(tmp_path / "data"))), steps=1)
    with pytest.raises(ValueError, match=r"validation\.rows is 17, but .*data holds 16 validation rows"):
        train(dataclasses.replace(config, validation=ValidationConfig(rows=17)))
    for rows in (15, 16):
        changed = dataclasses.replace(config, validation=ValidationConfig(rows=rows, num_steps=(1,)))
        train(dataclasses.replace(changed, out=str(tmp_path / f"run-{rows}")))


def test_finished_run_is_not_overwritten(finished):
    before = losses(finished)
    with pytest.raises(FileExistsError, match="resume"):
        train(small_run(finished))
    assert losses(finished) == before


def test_run_without_checkpoint_is_an_error_for_loading(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load_run_model(tmp_path)
