"""The blocks of README.md and docs/ run: first the tutorial, as a reader would follow it, then each page after it.

Training, generation and analysis are shortened by options that are added to the printed commands (SHORTER). Blocks with
a comment `<!-- not run: REASON -->` are only parsed (test_docs.py).
"""

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from printed import ROOT, all_pages, blocks, commands
from recurrent_depth.cli import main
from recurrent_depth.data.tasks.state import TASKS
from recurrent_depth.generation.exits import RULES
from recurrent_depth.quickstart import analyze_command, pipelines
from servers import answers, wait_until

README = ROOT / "README.md"
TUTORIAL = ROOT / "docs" / "tutorial.md"
SHORTER = {
    "train": "--steps 4 --batch-size 4 --checkpoint.every 2 --validation.rows 8 --validation.num-steps 1,2 "
    "--optimizer.warmup-steps 1 --optimizer.cooldown-steps 1 --runtime.threads 1",
    "--tasks": "--lm-eval.limit 4 --lm-eval.length 4",
    "--generated.tasks": "--generated.rows 16",
    "generate": "--max-new-tokens 4",
    "analyze": "--max-tokens 12 --num-steps 8 --converged-steps 64 --state-seeds 1 --jacobian-tokens 1",
    "chat": "--max-new-tokens 4",
    "--loss.model": "--loss.max-tokens 256 --loss.num-steps 1,2,4,8",
    "--categories.model": "--categories.num-steps 8",
    "--categories.task": "--categories.rows 16",
    "prepare": "--workers 1",
    "prepare-reasoning": "--block 128",
}
"""Options added to the printed commands with this verb or option, so that they take seconds."""

OURS = [sys.executable, "-m", "recurrent_depth.cli"]
PAGES = [page for page in all_pages() if page != TUTORIAL and any(not block.not_run for block in blocks(page))]
PAGES = [page for page in PAGES if any(block.language in ("bash", "python") for block in blocks(page))]


def shorter(arguments):
    """Return the options that shorten a command."""
    return [option for word in SHORTER if word in arguments for option in SHORTER[word].split()]


class Reader:
    """Run the blocks of pages in the current folder.

    Attributes:
        done: commands that were run, so that none is repeated by a page that continues from another.
    """

    def __init__(self, done=()):
        self.done = list(done)
        self.servers, self.ports = [], {}
        self.names = {}

    def read(self, page):
        """Run the blocks of a page in their order."""
        before = page.read_text().splitlines()
        for block in blocks(page):
            if block.not_run:
                continue
            if block.language == "bash":
                for command in commands(block):
                    print(f"\n{command}: {command.text}", flush=True)
                    self.run(command)
            elif block.language == "python":
                print(f"\n{block}", flush=True)
                text = " ".join(before[max(block.line - 6, 0) : block.line - 1])
                self.run_python(block, re.search(r"Save this as `(\w+\.py)`", text))

    def run(self, command):
        words = command.words
        if words in self.done:
            return
        self.done.append(list(words))
        if words[:2] == ["recurrent-depth", "quickstart"]:
            run_parts_of_quickstart(Path(words[-1]))
            return
        environment = dict(os.environ)
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            environment[name] = os.pathsep.join([value, *filter(None, [os.environ.get(name)])])
        program, *arguments = words
        arguments = [self.moved(argument) for argument in arguments]
        arguments += shorter(arguments)
        if program == "recurrent-depth" and arguments[0] == "serve":
            self.serve(arguments)
        elif program == "recurrent-depth" and arguments[0] == "chat":
            done = subprocess.run([*OURS, *arguments], input="Hello\n", text=True, capture_output=True)
            assert done.returncode == 0, done.stderr
            assert "Traceback" not in done.stderr
        elif program == "recurrent-depth" and environment == dict(os.environ):
            assert main(arguments) == 0
        else:
            started = {"recurrent-depth": OURS, "python": [sys.executable]}
            torchrun = [sys.executable, "-m", "torch.distributed.run"]
            subprocess.run([*(started | {"torchrun": torchrun})[program], *arguments], check=True, env=environment)

    def run_python(self, block, saved):
        if saved:
            Path(saved[1]).write_text(block.text)
        elif block.where == "in Triton's interpreter":
            Path("kernel.py").write_text(block.text)
            subprocess.run([sys.executable, "kernel.py"], check=True, env={**os.environ, "TRITON_INTERPRET": "1"})
        else:
            exec(compile(self.moved(block.text), str(block), "exec"), self.names)

    def serve(self, arguments):
        """Start a server on a free port, which the blocks after it find at the printed one."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        printed = arguments[arguments.index("--port") + 1] if "--port" in arguments else "8000"
        process = subprocess.Popen([*OURS, *arguments, "--port", str(port)])
        self.servers.append(process)
        self.ports[printed] = str(port)
        wait_until(lambda: process.poll() is not None or answers(f"http://127.0.0.1:{port}"), seconds=180)
        assert process.poll() is None

    def moved(self, text):
        """Return a text in which addresses of printed servers are those of the started ones."""
        for printed, port in self.ports.items():
            text = text.replace(f"localhost:{printed}", f"localhost:{port}")
        return text

    def stop(self):
        """Stop the servers as Ctrl-C does."""
        for process in self.servers:
            process.send_signal(signal.SIGINT)
            try:
                assert process.wait(60) in (0, 130)
            finally:
                process.kill()


@contextmanager
def restored(registry):
    """Remove what code inside adds to a registry."""
    before = dict(registry)
    try:
        yield
    finally:
        registry.clear()
        registry.update(before)


@contextmanager
def working_in(folder):
    previous = Path.cwd()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        os.chdir(previous)


def run_parts_of_quickstart(out):
    """Run the parts of the quickstart that pages use; tests/test_quickstart.py runs all of it."""
    work = pipelines(out, "configs/pretrain/quickstart")
    for arguments in [*work["shell-game"], *work["text"], analyze_command(out)]:
        results = ["--generated.modes", "parallel"] if arguments[0] == "eval" else []
        known = arguments if arguments[0] != "analyze" else arguments[: arguments.index("--results")]
        assert main([*known, *results, *shorter(known)]) == 0


def write_inputs(folder):
    """Write the files and models that pages other than the tutorial call by name."""
    lines = [f"How much is {n} plus {n}? {n} plus {n} is {2 * n}." for n in range(400)]
    rows = [{"question": line, "trace": f"{line} Wait.", "answer": line[-4:]} for line in lines[:200]]
    for name in ("curated", "texts"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "curated" / "examples.parquet")
    (folder / "report.txt").write_text("\n".join(lines))
    for number in range(40):
        (folder / "texts" / f"{number}.txt").write_text("\n".join(lines))
    texts = [{"text": line, "category": ("even", "odd")[n % 2]} for n, line in enumerate(lines[:8])]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    for trained in (4, 16):
        shutil.copytree(folder / "runs/quickstart/eval-shell-game", folder / f"eval-{trained}")
    (folder / "BASE").symlink_to("exports/text")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 30, "num_attention_heads": 2}
    tokenizer = AutoTokenizer.from_pretrained(folder / "BASE")
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder / "SMOLLM2_FOLDER")
    tokenizer.save_pretrained(folder / "SMOLLM2_FOLDER")


@pytest.fixture(scope="session")
def finished_tutorial(tmp_path_factory):
    """A folder in which the tutorial was followed. The workers of pytest share one."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "tutorial"
    folder.mkdir(exist_ok=True)
    done = folder / "done.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            with working_in(folder), pytest.MonkeyPatch.context() as patch:
                patch.setenv("OMP_NUM_THREADS", "1")
                patch.setenv("HF_HUB_OFFLINE", "1")
                reader = Reader()
                reader.read(TUTORIAL)
            write_inputs(folder)
            done.write_text(json.dumps(reader.done))
    return folder


@pytest.mark.slow
def test_tutorial_runs_in_an_empty_folder(finished_tutorial):
    for path in ("results/text/results.csv", "analysis-sums/index.html", "exports/text/config.json"):
        assert (finished_tutorial / path).is_file(), path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_of_page_run_after_the_tutorial(page, finished_tutorial, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "work"
    shutil.copytree(finished_tutorial, folder, symlinks=True)
    reader = Reader(json.loads((folder / "done.json").read_text()))
    with working_in(folder), restored(TASKS), restored(RULES):
        try:
            reader.read(page)
        finally:
            reader.stop()


def test_install_page_names_every_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    page = (ROOT / "docs" / "install.md").read_text()
    assert set(re.findall(r"^\| `([a-z]+)` \|", page, re.MULTILINE)) == set(extras)


def test_files_to_read_exist_and_have_about_these_lines():
    rows = re.findall(r"^\| `(recurrent_depth/\S+\.py)` \| (\d+) \|", README.read_text(), re.MULTILINE)
    assert len(rows) == 6
    for path, lines in rows:
        counted = len((ROOT / path).read_text().splitlines())
        assert abs(int(lines) - counted) <= counted / 10, f"{path} has {counted} lines"
