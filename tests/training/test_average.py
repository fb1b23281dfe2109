"""Averaged checkpoints against numpy, and the uses of the result."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from recurrent_depth.cli import main
from recurrent_depth.runs import CheckpointError, checkpoints, load_run_model, read_details, run_tokenizer
from recurrent_depth.training.average import average
from recurrent_depth.training.commands import AverageConfig
from recurrent_depth.training.config import CheckpointConfig
from recurrent_depth.training.launch import train
from support import full_disk, small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("average") / "run"
    return train(small_run(folder, checkpoint=CheckpointConfig(every=2, keep_last=9)))


def weights(checkpoint):
    """Return the weights read directly from the files, in fp64."""
    (path,) = (checkpoint / "model").glob("*.safetensors")
    return {name: value.astype(np.float64) for name, value in load_file(path).items()}


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"method": "uniform"}, [2, 4, 6, 8, 10, 12]),
        ({"method": "ema", "decay": 0.6, "last": 4}, [6, 8, 10, 12]),
        ({"method": "ema", "decay": 0.9, "last": 2, "every": 3}, [6, 12]),
    ],
)
def test_average_equals_numpy(run, tmp_path, options, steps):
    out = average(AverageConfig(model=str(run), out=str(tmp_path / "merged"), **options))
    parts = [weights(path) for path in checkpoints(run) if read_details(path)["step"] in steps]
    n, decay = len(steps), options.get("decay")
    if options["method"] == "uniform":
        shares = np.full(n, 1 / n)
    else:
        shares = np.array([decay ** (n - 1 - i) * (1 - decay if i else 1) for i in range(n)])
    assert shares.sum() == pytest.approx(1)
    (checkpoint,) = checkpoints(out)
    assert read_details(checkpoint)["average"]["steps"] == steps
    actual = weights(checkpoint)
    for name in parts[0]:
        expected = sum(share * part[name] for share, part in zip(shares, parts, strict=True))
        np.testing.assert_allclose(actual[name], expected, rtol=1e-5, atol=1e-7)


def test_average_can_be_loaded_and_started_from_but_not_resumed(run, tmp_path):
    out = tmp_path / "merged"
    assert main(["average", "--model", str(run), "--out", str(out), "--method", "uniform"]) == 0
    assert load_run_model(out).config == load_run_model(run).config
    assert run_tokenizer(out) is not None
    train(small_run(tmp_path / "next", init_from=str(out), steps=1))
    with pytest.raises(CheckpointError, match="without moments"):
        train(small_run(out), resume=True)


def test_average_refuses_too_few_checkpoints_and_existing_folders(run, tmp_path, capsys):
    assert main(["average", "--model", str(run), "--out", str(tmp_path / "m"), "--every", "9"]) == 1
    assert "keep_last" in capsys.readouterr().err
    assert main(["average", "--model", str(run), "--out", str(run)]) == 1
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["safetensors", "checkpoint.json", "run.yaml"])
def test_average_on_a_full_disk_leaves_no_folder(run, tmp_path, capsys, monkeypatch, name):
    full_disk(monkeypatch, name)
    assert main(["average", "--model", str(run), "--out", str(tmp_path / "merged")]) == 1
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert "free some space" in message
    assert list(tmp_path.iterdir()) == []


def test_average_names_a_damaged_run_file(run, tmp_path, capsys):
    damaged = tmp_path / "run"
    shutil.copytree(run, damaged)
    (damaged / "run.yaml").write_text("a: [")
    assert main(["average", "--model", str(damaged), "--out", str(tmp_path / "merged")]) == 1
    assert "run.yaml cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
