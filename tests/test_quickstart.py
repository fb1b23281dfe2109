"""The quickstart: its commands, baselines, output and dependencies."""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
import tomllib
from importlib.metadata import distribution, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from recurrent_depth.cli import VERBS, main
from recurrent_depth.data.loader import open_source
from recurrent_depth.data.tasks.state import TASKS, VALIDATION_SPLIT
from recurrent_depth.model.flops import training_flops
from recurrent_depth.model.recurrence import sample_depth
from recurrent_depth.parsing import parse_options
from recurrent_depth.quickstart import (
    BASELINES,
    GAMES,
    RECURRENT,
    TEXT,
    Commands,
    analyze_command,
    pipelines,
    read_cost,
    report_command,
)
from recurrent_depth.training.config import TrainCommand

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "pretrain" / "quickstart"
MODELS = (RECURRENT, *BASELINES)


def config_of(name):
    return parse_options(TrainCommand, ["--config", str(CONFIGS / f"{name}.yaml")]).run_config()


def test_quickstart_commands_have_valid_options(tmp_path):
    commands = [command for work in pipelines(tmp_path, str(CONFIGS)).values() for command in work]
    for verb, *arguments in [
        *commands,
        report_command(tmp_path, tmp_path / "report.html"),
        analyze_command(tmp_path),
    ]:
        module, _, name = VERBS[verb].options.partition(":")
        options = getattr(importlib.import_module(module), name)
        assert dataclasses.is_dataclass(parse_options(options, arguments))


def test_quickstart_models_share_seed_data_and_batch():
    configs = [config_of(name) for name in MODELS]
    for field in ("seed", "data", "batch_size"):
        assert len({repr(getattr(config, field)) for config in configs}) == 1, field


def test_quickstart_page_shows_held_out_games():
    task = TASKS["shell_game"]
    ids, _ = task.rows(0, len(GAMES), 15, seed=0, split=VALIDATION_SPLIT)
    assert [task.text(row) for row in ids.tolist()] == list(GAMES)


def run_flops(config):
    """Return the FLOPs of a run, from the rows and depths of its training steps."""
    source = open_source(config.data, "train", config.seed, config.steps)
    total = 0
    for step in range(config.steps):
        depth = sample_depth(config.model, seed=config.seed, step=step, micro_step=0)
        total += config.batch_size * training_flops(config.model, source.batch(0, 1, step).input_ids.shape[1], *depth)
    return total


@pytest.mark.parametrize("name", BASELINES)
def test_quickstart_baselines_train_with_the_flops_of_the_recurrent_model(name):
    assert run_flops(config_of(name)) == pytest.approx(run_flops(config_of(RECURRENT)), rel=0.01)


def test_quickstart_refuses_a_folder_with_content(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["quickstart", "--out", str(tmp_path)]) == 1
    assert f"{tmp_path} exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_quickstart_reports_which_command_failed(tmp_path, capsys):
    status = main(["quickstart", "--out", str(tmp_path / "out"), "--configs", str(tmp_path / "nowhere")])
    output = capsys.readouterr()
    assert status == 1
    assert re.search(r"error: [\w-]+: `recurrent-depth train` ended with status \d", output.err)
    assert f"{tmp_path}/nowhere" in output.out
    assert not (tmp_path / "out" / "report.html").exists()


def test_quickstart_ends_running_commands_when_one_fails(tmp_path):
    class Failure(Exception):
        pass

    def fail(commands):
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], text=True)
        commands.running.append(process)
        raise Failure

    commands = Commands()
    with pytest.raises(Failure), commands:
        fail(commands)
    assert commands.running[0].wait(timeout=60) != 0
    commands.run("late", ["train", "--out", str(tmp_path / "late")])
    assert len(commands.running) == 1
    assert not (tmp_path / "late").exists()


@pytest.fixture
def only_the_extra(tmp_path, monkeypatch):
    """Processes started in this test see only what `pip install recurrent-depth[quickstart]` would install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    site = tmp_path / "site"
    site.mkdir()
    for name in closure([*project["dependencies"], *project["optional-dependencies"]["quickstart"]]):
        link_distribution(site, distribution(name))
    # Not by importlib: a folder recurrent_depth.egg-info in the checkout, left by a build, would be found first.
    (metadata,) = Path(sysconfig.get_paths()["purelib"]).glob("recurrent_depth-*.dist-info")
    (site / metadata.name).symlink_to(metadata)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(ROOT), str(ROOT / "kernels")]))
    monkeypatch.setattr(sys, "executable", sys._base_executable)


def closure(requirements):
    """Return the names of all distributions that the requirements need, directly or indirectly."""
    names, waiting = set(), [Requirement(text) for text in requirements]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        environments = [{"extra": extra} for extra in (*wanted.extras, "")]
        if name in names:
            continue
        names.add(name)
        for text in requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate(environment) for environment in environments):
                waiting.append(needed)
    return names


def link_distribution(site, found):
    """Link the top-level files and folders of an installed distribution into `site`."""
    for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
        if not (site / top).exists():
            (site / top).symlink_to(found.locate_file(top))


@pytest.mark.slow
def test_quickstart_writes_a_report_with_its_extra_alone(tmp_path, capsys, only_the_extra):
    configs, out = tmp_path / "configs", tmp_path / "out"
    configs.mkdir()
    for name in (*MODELS, TEXT):
        settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        settings |= {"steps": 12, "batch_size": 8, "log_every": 4}
        settings["optimizer"] |= {"warmup_steps": 3, "cooldown_steps": 3}
        (configs / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    code = "import importlib.util as u; print(u.find_spec('lm_eval'), u.find_spec('datasets'))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "None None"
    began = time.monotonic()
    assert main(["quickstart", "--out", str(out), "--configs", str(configs)]) == 0
    printed = capsys.readouterr().out
    seconds = int(re.search(r"total time: (\d+) s", printed)[1])
    assert 0 < seconds <= time.monotonic() - began + 0.5  # rounded
    assert "data:image/png" in (out / "report.html").read_text()
    assert f"watch it think: {out / 'analysis' / 'index.html'}" in printed
    page = (out / "analysis" / "index.html").read_text()
    assert "swap01" in page
    assert "fixed-10" in page
    results = json.loads((out / f"eval-{RECURRENT}" / "results.json").read_text())["results"]
    for result in results:
        if (result["difficulty"], result["mode"]) == ("all", "parallel"):
            assert f"{100 * result['value']:.1f}" in re.search(rf"^{RECURRENT} +\d.*FLOPs.*$", printed, re.M)[0]
    for name in MODELS:
        flops, _ = read_cost(out / name)
        assert re.search(rf"^{name} .* {re.escape(f'{flops:.2e}')} FLOPs, \d+ s$", printed, re.M)
        assert re.search(rf"^{name} +step 12/12 ", printed, re.M)
