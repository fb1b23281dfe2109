"""The command line: shipped configurations, help, errors, exit statuses."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from recurrent_depth.building import build
from recurrent_depth.cli import INTERRUPTED, VERBS, Verb, main, run_verb
from recurrent_depth.data.config import PrepareConfig
from recurrent_depth.errors import UserError
from recurrent_depth.model.config import SHAPES, ModelConfig
from recurrent_depth.parsing import options_of, parse_options, read_yaml, shipped_configs
from recurrent_depth.reasoning.config import CurateConfig, ReasoningDataConfig
from recurrent_depth.training.config import TrainCommand

ROOT = Path(__file__).parents[1]
FOLDERS = [ROOT / "configs" / kind for kind in ("pretrain", "finetune")]
CONFIGS = sorted(path for folder in FOLDERS for path in folder.rglob("*.yaml"))
SHELL_GAME = next(path for path in CONFIGS if path.name == "shell-game.yaml")
HEAVY = ("torch", "transformers", "datasets", "matplotlib", "pyarrow", "numpy", "tokenizers", "lm_eval", "sklearn")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_run_configuration_parses(path):
    command = parse_options(TrainCommand, ["--config", str(path)])
    assert command.run_config().steps == yaml.safe_load(path.read_text())["steps"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_file_is_of_a_known_kind(path):
    """Model shapes, data, curation recipes. Runs are tested above, evaluations in tests/evaluation."""
    name = path.relative_to(ROOT / "configs")
    if name.parts[0] == "model":
        assert build(ModelConfig, read_yaml(path)) == SHAPES[path.stem]
    elif name.parts[0] == "curate":
        assert parse_options(CurateConfig, ["--config", str(path), "--out", "o"]).pool
    elif name.parts[0] == "data":
        cls = ReasoningDataConfig if name.stem == "s1" else PrepareConfig
        assert parse_options(cls, ["--config", str(path), "--out", "o"]).out == "o"
    else:
        assert name.parts[0] in ("pretrain", "finetune", "eval")


LARGE = [path for path in CONFIGS if path.parent.name == "pretrain" and path.name.startswith(("huginn", "100m"))]


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_large_configuration_says_how_it_is_launched_and_can_be_planned(path, capsys):
    assert f"train.py --config configs/pretrain/{path.name}" in path.read_text()
    gpus = "8" if "huginn" in path.name else "1"
    assert main(["plan", "--run", str(path), "--num-gpus", gpus, "--device", "mi300x"]) == 0
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_model_file_is_the_named_shape(name):
    file = ROOT / "configs" / "model" / f"{name}.yaml"
    command = parse_options(TrainCommand, ["--config", str(SHELL_GAME), "--model", str(file)])
    assert command.model == SHAPES[name]


def test_printed_configuration_reads_back(tmp_path, capsys):
    arguments = ["--config", str(SHELL_GAME), "--optimizer.lr", "0.5"]
    assert main(["train", *arguments, "--dry-run"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    again = parse_options(TrainCommand, ["--config", str(printed)]).run_config()
    assert again == parse_options(TrainCommand, arguments).run_config()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data.packed.path", "b"],
        ["--data.packed.path=b"],
        ["--data.packed.path", "b", "--data.packed.restart-positions", "true"],
    ],
)
@pytest.mark.parametrize("form", ["--config={}", "--config {}"])
def test_one_field_of_a_section_leaves_the_others(arguments, form, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("out: o\ndata: {packed: {path: a, document_masking: true, restart_positions: true}}\n")
    data = parse_options(TrainCommand, [*form.format(file).split(), *arguments]).data.packed
    assert (data.path, data.document_masking, data.restart_positions) == ("b", True, True)


def test_options_accept_dashes_and_lists_with_commas():
    options = parse_options(PrepareConfig, ["--out", "o", "--source", "a,b", "--sequence-length", "64"])
    assert options.source == ["a", "b"]
    assert options.sequence_length == 64
    for name in ("num_steps", "num-steps"):
        command = parse_options(TrainCommand, ["--config", str(SHELL_GAME), f"--validation.{name}", "1,4,8"])
        assert command.validation.num_steps == (1, 4, 8)


@pytest.mark.parametrize("name", ["configs/pretrain/quickstart/shell-game.yaml", "pretrain/quickstart/shell-game.yaml"])
def test_shipped_configuration_is_found_in_an_empty_folder(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", name, "--dry-run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["task"]["name"] == "shell_game"
    command = parse_options(TrainCommand, ["--config", name, "--model", "configs/model/tiny.yaml"])
    assert command.model == SHAPES["tiny"]
    (tmp_path / "pretrain" / "quickstart").mkdir(parents=True)
    (tmp_path / "pretrain" / "quickstart" / "shell-game.yaml").write_text(
        "steps: 7\ndata: {packed: {path: d}}\nout: o\n"
    )
    if not name.startswith("configs"):  # a file of the user has precedence
        assert parse_options(TrainCommand, ["--config", name]).steps == 7


def test_configs_lists_every_shipped_file(capsys):
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [str(path) for path in shipped_configs()]
    assert len(lines) == len(list((ROOT / "configs").rglob("*.yaml")))


def test_overview_fits_a_screen_and_names_every_verb(capsys):
    assert main([]) == 0
    overview = capsys.readouterr().out
    assert len(overview.splitlines()) <= 24
    assert all(len(line) <= 80 for line in overview.splitlines())
    assert all(f"  {name} " in overview for name in VERBS)
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == overview


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_script_knows_verbs_and_options(shell, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(text in script for text in ("train-dense", "--optimizer.warmup-steps", "mi300x"))
    assert main(["completion", "fish-and-chips"]) == 1
    assert "'fish-and-chips' is not a shell" in capsys.readouterr().err


def test_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("recurrent-depth ")


def test_unknown_verb_is_an_error(capsys):
    assert main(["dance"]) == 2
    assert "unknown verb 'dance'" in capsys.readouterr().err


@pytest.mark.parametrize("name", VERBS)
def test_help_explains_every_option_and_gives_an_example(name, capsys):
    module, _, options = VERBS[name].options.partition(":")
    cls = getattr(importlib.import_module(module), options)
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: recurrent-depth {name} ")
    assert f"\nexample:\n  recurrent-depth {name} " in text
    files = tuple(f"{option.name}." for option in options_of(cls) if "file" in option.field.metadata)
    for option in options_of(cls):
        if not option.name.startswith(files or ("\0",)):
            assert f"--{option.name.replace('_', '-')} " in text
            assert option.text, f"{option.name} is not explained in a docstring"


@pytest.mark.parametrize("name", VERBS)
def test_help_and_option_errors_import_nothing_heavy(name):
    code = (
        "import json, sys; from recurrent_depth.cli import main\n"
        f"main(['{name}', '--help']); main(['{name}', '--no-such-option', '1'])\n"
        f"print(json.dumps([h for h in {HEAVY!r} if h in sys.modules]), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stderr.splitlines()[-1]) == []
    assert "unknown option --no-such-option" in result.stderr


def test_package_import_is_light():
    code = "import recurrent_depth, sys; print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("transformers", "pyarrow", "lm_eval", "datasets", "rich"):
        assert f"'{heavy}'" not in modules


def test_error_comes_before_a_short_usage(capsys):
    assert main(["train", "--out", "o", "--steps", "0", "--data.packed.path", "d"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: steps is 0; it must be at least 1"
    assert lines[2].startswith("usage: recurrent-depth train --out TEXT")
    assert lines[3] == "recurrent-depth train --help explains every option"
    assert len(lines) == 4


def verb(action, extra="data", needs=()):
    """Return a verb with the options of `average` that calls `action`."""
    sys.modules["action_of_a_test"] = SimpleNamespace(act=action)
    options = "recurrent_depth.training.commands:AverageConfig"
    return Verb("", options, "action_of_a_test:act", "recurrent-depth act", extra, needs)


ARGUMENTS = ["--model", "m", "--out", "out/folder"]


def raising(error):
    def action(config):
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("lr is 0; it must be above 0"), 1, "error: lr is 0; it must be above 0\n"),
        (FileNotFoundError("no such folder"), 1, "error: no such folder\n"),
        (UserError("the run cannot succeed"), 1, "error: the run cannot succeed\n"),
        (KeyboardInterrupt(), INTERRUPTED, "\ninterrupted\n"),
    ],
)
def test_error_of_a_verb_is_one_line(error, status, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_verb(verb(raising(error)), "recurrent-depth act", ARGUMENTS) == status
    assert capsys.readouterr().err == message


def test_unexpected_error_is_one_line_and_its_trace_is_in_a_file(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run_verb(verb(raising(KeyError("x"))), "recurrent-depth act", ARGUMENTS) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: KeyError: 'x'"
    (file,) = tmp_path.glob("recurrent-depth-*.txt")
    assert str(file) in second
    assert "Traceback (most recent call last)" in file.read_text()
    assert "KeyError: 'x'" in file.read_text()


@pytest.mark.parametrize("way", ["argument", "variable"])
def test_traceback_is_shown_on_request(way, capsys, monkeypatch):
    arguments = [*ARGUMENTS, "--traceback"] if way == "argument" else ARGUMENTS
    if way == "variable":
        monkeypatch.setenv("RECURRENT_DEPTH_TRACEBACK", "1")
    assert run_verb(verb(raising(ValueError("why"))), "recurrent-depth act", arguments) == 1
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert error.endswith("error: why\n")


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval.api"), None])
def test_missing_package_names_the_extra(error, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    needs = () if error else ("no_such_package",)
    assert run_verb(verb(raising(error or AssertionError), "eval", needs), "recurrent-depth act", ARGUMENTS) == 1
    package = "lm_eval" if error else "no_such_package"
    expected = f"error: recurrent-depth act needs the package {package}: pip install 'recurrent-depth[eval]'\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (["curate", "--out", "set", "--pool", "{path: rows.jsonl}"], "matplotlib", "curate"),
        (
            ["train-dense", "--run", "finetune/s1.yaml", "--model", "m", "--out", "o"],
            "accelerate",
            "hf",
        ),
        (["train", "--config", str(SHELL_GAME), "--out", "o", "--init-from", "folder"], "transformers", "hf"),
    ],
)
def test_verb_without_its_extra_says_so_before_it_begins(arguments, package, extra, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    monkeypatch.setitem(sys.modules, package, None)
    assert main(arguments) == 1
    verb = f"recurrent-depth {arguments[0]}"
    expected = f"error: {verb} needs the package {package}: pip install 'recurrent-depth[{extra}]'\n"
    assert capsys.readouterr().err == expected
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_missing_module_of_our_own_is_unexpected(capsys):
    error = ModuleNotFoundError("No module named 'recurrent_depth.gone'", name="recurrent_depth.gone")
    assert run_verb(verb(raising(error)), "recurrent-depth act", ARGUMENTS) == 1
    assert capsys.readouterr().err.startswith("error: ModuleNotFoundError: No module named 'recurrent_depth.gone'\n")


@pytest.mark.parametrize("error", [ValueError("refused"), KeyboardInterrupt()])
def test_refused_command_leaves_no_empty_folder(error, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def action(config):
        (Path(config.out) / "cache" / "inner").mkdir(parents=True)
        (Path(config.out) / ".lock").touch()
        raise error

    assert run_verb(verb(action), "recurrent-depth act", ARGUMENTS) != 0
    assert list(tmp_path.iterdir()) == []


def test_failed_command_keeps_what_it_wrote_and_what_was_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "empty").mkdir(parents=True)

    def action(config):
        Path(config.out).mkdir(exist_ok=True)
        if write:
            (Path(config.out) / "half.txt").touch()
        raise ValueError("full disk")

    for write in (False, True):
        assert run_verb(verb(action), "recurrent-depth act", ARGUMENTS) == 1
        assert (tmp_path / "out" / "folder").exists() == write
        assert (tmp_path / "out" / "empty").is_dir()


def test_extras_of_the_verbs_exist():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {verb.extra for verb in VERBS.values()} <= set(extras)


@pytest.mark.slow
def test_ctrl_c_ends_a_command_in_one_line(tmp_path):
    """The command waits for a server that never answers."""
    code = "import socket, time; s = socket.create_server(('localhost', 0)); print(s.getsockname()[1], flush=True)"
    server = subprocess.Popen([sys.executable, "-c", f"{code}; time.sleep(60)"], stdout=subprocess.PIPE, text=True)
    try:
        port = server.stdout.readline().strip()
        (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?", "answer": "2", "trace": ""}\n' * 20)
        endpoint = f"{{url: http://localhost:{port}/v1, model: m}}"
        arguments = ["--out", "set", "--pool", "{path: rows.jsonl}"]
        arguments += ["--stages", f"{{stage: teacher, writer: {{endpoint: {endpoint}}}}}"]
        command = subprocess.Popen(
            [sys.executable, "-m", "recurrent_depth.cli", "curate", *arguments],
            cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while not (tmp_path / "set" / "cache" / "answers").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.5)
        os.killpg(command.pid, signal.SIGINT)
        error = command.communicate(timeout=20)[1]
    finally:
        server.kill()
    assert command.returncode == INTERRUPTED
    assert error.endswith("interrupted\n")
    assert "Traceback" not in error
