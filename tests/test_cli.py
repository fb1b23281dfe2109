"""What a user sees of wrong commands: cause, fix, non-zero exit."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recurrent_depth.cli import main
from recurrent_depth.data.config import PrepareConfig
from recurrent_depth.model.config import SHAPES
from recurrent_depth.parsing import parse_options
from recurrent_depth.training.config import TrainCommand

FOLDERS = [Path(__file__).parents[1] / "configs" / kind for kind in ("pretrain", "finetune")]
CONFIGS = sorted(path for folder in FOLDERS for path in folder.rglob("*.yaml"))
SHELL_GAME = next(path for path in CONFIGS if path.name == "shell-game.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_parses(path):
    command = parse_options(TrainCommand, ["--config", str(path)])
    assert command.run_config().steps == yaml.safe_load(path.read_text())["steps"]


LARGE = [path for path in CONFIGS if path.parent.name == "pretrain" and path.name.startswith(("huginn", "100m"))]


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_large_configurations_say_how_they_are_launched_and_can_be_planned(path, capsys):
    assert f"train.py --config configs/pretrain/{path.name}" in path.read_text()
    gpus = "8" if "huginn" in path.name else "1"
    assert main(["plan", "--run", str(path), "--num-gpus", gpus, "--device", "mi300x"]) == 0
    assert "tokens a second" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_model_files_are_the_named_shapes(name):
    file = SHELL_GAME.parents[2] / "model" / f"{name}.yaml"
    command = parse_options(TrainCommand, ["--config", str(SHELL_GAME), "--model", str(file)])
    assert command.model == SHAPES[name]


def test_the_printed_configuration_reads_back(tmp_path, capsys):
    assert main(["train", "--config", str(SHELL_GAME), "--optimizer.lr", "0.5", "--dry-run", "true"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    again = parse_options(TrainCommand, ["--config", str(printed)]).run_config()
    expected = parse_options(TrainCommand, ["--config", str(SHELL_GAME), "--optimizer.lr", "0.5"]).run_config()
    assert again == expected


def test_one_field_of_the_data_leaves_the_others(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("out: o\ndata: {packed: {path: a, document_masking: true, restart_positions: true}}\n")
    for arguments in (
        ["--data.packed.path", "b"],
        ["--data.packed.path=b"],
        ["--data.packed.path", "b", "--data.packed.restart-positions", "true"],
    ):
        data = parse_options(TrainCommand, ["--config", str(file), *arguments]).data.packed
        assert (data.path, data.document_masking, data.restart_positions) == ("b", True, True)


def test_dashes_and_bare_lists():
    options = parse_options(PrepareConfig, ["--out", "o", "--source", "a,b", "--sequence-length", "64"])
    assert options.source == ["a", "b"]
    assert options.sequence_length == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config", str(SHELL_GAME), "--model.width", "3"], "model.width"),
        (["train", "--config", str(SHELL_GAME), "--model.n_embd", "63"], "model.n_embd"),
        (["train", "--config", str(SHELL_GAME), "--batch_size", "0"], "batch_size"),
        (["train", "--config", str(SHELL_GAME), "--model.vocab_size", "8"], "model.vocab_size"),
        (["train", "--config", str(SHELL_GAME), "--model.block_size", "8"], "model.block_size"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["eval", "--model", "nowhere", "--out", "OUT", "--dense", "shell_game"], "nowhere"),
        (["eval", "--model", "nowhere", "--out", "OUT", "--dense", "shell_game", "--num-steps", "0"], "at least 1"),
        (["eval", "--model", "nowhere", "--out", "OUT", "--dense", "chess"], "chess"),
        (["dance"], "unknown verb"),
    ],
)
def test_mistakes_name_cause_and_exit(arguments, message, tmp_path, capsys):
    arguments = [str(tmp_path / "out") if a == "OUT" else a for a in arguments]
    if arguments[0] == "train":
        arguments += ["--out", str(tmp_path / "run")]
    try:
        status = main(arguments)
    except SystemExit as stop:  # argument errors of the parser
        status = stop.code
    assert status not in (0, None)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_import_is_light():
    code = "import recurrent_depth, sys; print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("transformers", "pyarrow", "lm_eval", "datasets", "rich"):
        assert f"'{heavy}'" not in modules
