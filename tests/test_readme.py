"""README.md is right: its commands and code run in order, and its tables equal those of the benchmarks."""

import json
import re
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from printed import ROOT, blocks, commands
from recurrent_depth.cli import main
from servers import answers, wait_until

PAGE = ROOT / "README.md"
README = PAGE.read_text()

NOT_RUN = {
    "git": "needs a network",
    "cd": "follows git clone",
    "pip": "needs a network",
    "recurrent-depth quickstart": "takes minutes; tests/test_quickstart.py runs it",
}
SHORTER = {
    "train": "--steps 4 --checkpoint.every 2 --validation.rows 8 --validation.num-steps 1,2 "
    "--optimizer.warmup-steps 1 --optimizer.cooldown-steps 1 --runtime.threads 1",
    "eval": "--num-steps 2",
    "generate": "--max-new-tokens 4",
}
"""Options added to the printed commands, so that they take seconds. --num-steps adds to the printed iterations."""

OURS = [sys.executable, "-m", "recurrent_depth.cli"]


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A working folder that contains only the rows that the last command reads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [
        {"question": f"How much is {n} + {n}?", "trace": f"{n} + {n} = {2 * n}", "answer": 2 * n} for n in range(200)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(program, *arguments):
    """Run a shortened version of one printed command; raise if it fails."""
    arguments = [*arguments, *(word for verb in SHORTER if verb in arguments for word in SHORTER[verb].split())]
    if program == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        subprocess.run([*torchrun, *arguments], check=True)
    elif arguments[0] == "serve":
        serve(*arguments)
    elif arguments[0] == "chat":
        done = subprocess.run(
            [*OURS, *arguments, "--max-new-tokens", "4"], input="Hello\n", text=True, capture_output=True
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    else:
        assert program == "recurrent-depth"
        assert main(arguments) == 0


def serve(*arguments):
    """Start a server, wait until it answers, and stop it as Ctrl-C does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([*OURS, *arguments, "--port", str(port)])
    try:
        wait_until(lambda: process.poll() is not None or answers(f"http://127.0.0.1:{port}"), seconds=180)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130)
    finally:
        process.kill()


@pytest.mark.slow
def test_readme_commands_run_in_order_in_an_empty_folder(empty, capsys):
    for command in commands(PAGE):
        words = command.words
        if not {words[0], " ".join(words[:2])} & set(NOT_RUN):
            with capsys.disabled():
                print(f"\n{command}: {' '.join(words)}", end="", flush=True)
            run(*words)
    for language, block in blocks(PAGE):
        if language == "python":
            exec(compile(block.text, str(block), "exec"), {})
    for path in (
        "exports/text/config.json",
        "results/shell-game/results.csv",
        "results/lm-eval/results.csv",
        "report.html",
    ):
        assert Path(path).is_file()


def test_readme_names_every_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"^\| `([a-z]+)` \|", README, re.MULTILINE)) == set(extras)


def test_files_to_read_exist_and_have_about_these_lines():
    rows = re.findall(r"^\| `(recurrent_depth/\S+\.py)` \| (\d+) \|", README, re.MULTILINE)
    assert len(rows) == 6
    for path, lines in rows:
        counted = len((ROOT / path).read_text().splitlines())
        assert abs(int(lines) - counted) <= counted / 10, f"{path} has {counted} lines"
