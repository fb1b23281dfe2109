"""The chat on a terminal, with its own server and with a running one."""

import io
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import recurrent_depth.hf  # noqa: F401
from recurrent_depth.cli import main
from recurrent_depth.serving.chat import chat
from recurrent_depth.serving.config import ChatConfig
from servers import metric, running, wait_until
from support import ANSWER, QUESTION, error_line


class Terminal:
    """A simulated terminal: lines of input, and functions that are called between them."""

    def __init__(self, *lines):
        self.lines = list(lines)

    def isatty(self):
        return False

    def readline(self):
        line = self.lines.pop(0) if self.lines else ""
        return self.readline() if callable(line) and line() is None else f"{line}\n" if line else ""


@pytest.fixture(scope="module")
def answering(answering_folder):
    with running(answering_folder, served_name="small") as (url, _):
        yield url


def talk(monkeypatch, capsys, *lines, **options):
    monkeypatch.setattr(sys, "stdin", Terminal(*lines))
    chat(ChatConfig(**({"num_steps": 4, "max_new_tokens": 30} | options)))
    return capsys.readouterr()


def test_chat_answers_and_ends_its_turn(monkeypatch, capsys, answering):
    out, err = talk(monkeypatch, capsys, QUESTION, url=f"{answering}/v1")
    assert out == ANSWER + "\n"
    assert err == ""


def test_chat_answers_by_default_within_the_context_of_a_small_model(monkeypatch, capsys, chat_folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(chat_folder, block_size=96, ignore_mismatched_sizes=True).save_pretrained(
        tmp_path / "small"
    )
    AutoTokenizer.from_pretrained(chat_folder).save_pretrained(tmp_path / "small")
    model = str(tmp_path / "small")
    capsys.readouterr()
    out, err = talk(monkeypatch, capsys, "the quick", model=model, device="cpu", max_new_tokens=None)
    assert out.strip()
    assert err.splitlines() == [f"loading {model}"]


def test_chat_starts_a_server_without_logs(monkeypatch, capsys, answering_folder):
    before = set(threading.enumerate())
    out, err = talk(monkeypatch, capsys, QUESTION, model=str(answering_folder), device="cpu")
    assert out == ANSWER + "\n"
    assert err.splitlines() == [f"loading {answering_folder}"]
    assert not [thread.name for thread in set(threading.enumerate()) - before if thread.name in ("server", "decoding")]


def test_chat_drops_the_oldest_messages_if_the_context_is_full(monkeypatch, capsys, answering):
    long = "apples " * 1200
    out, err = talk(monkeypatch, capsys, long, long, QUESTION, long * 10, QUESTION, url=f"{answering}/v1", system="s")
    assert out.splitlines()[-1]  # the last question has an answer
    assert err.count("the oldest question and answer are forgotten") >= 1
    assert "exceeds the context of 2048 tokens" in err  # the question that cannot fit at all
    assert "Traceback" not in err


def test_chat_continues_after_a_lost_server(monkeypatch, capsys, answering_folder):
    with running(answering_folder) as (url, server):
        out, err = talk(monkeypatch, capsys, QUESTION, server.stop, "and now?", "again?", url=f"{url}/v1")
    assert out.splitlines()[0] == ANSWER
    assert err.splitlines() == [f"error: no server answers at {url}/v1/; ask again when it is back"] * 2


def test_chat_reports_unreachable_server(capsys):
    assert main(["chat", "--url", "http://127.0.0.1:9/v1"]) != 0
    assert error_line(capsys).startswith("error: url: no server answers at http://127.0.0.1:9/v1")


def test_chat_reports_another_model_and_another_key(capsys, answering, strict_server):
    assert main(["chat", "--url", f"{answering}/v1", "--model", "gpt"]) != 0
    assert "served are small" in error_line(capsys)
    assert main(["chat", "--url", f"{strict_server}/v1"]) != 0
    assert "api_key" in error_line(capsys)
    assert main(["chat", "--url", answering]) != 0
    assert "usually ends in /v1" in error_line(capsys)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--temperature", ".nan"], "temperature"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--num-steps", "0"], "num_steps"),
        (["--url", "localhost:8000"], "url"),
        (["--model", "/no/such/folder"], "no such folder"),
        ([], "give a model"),
    ],
)
def test_chat_options_that_cannot_work_are_explained(capsys, options, field):
    rest = [] if {"--url", "--model"} & set(options) or not options else ["--model", "m"]
    assert main(["chat", *options, *rest]) != 0
    assert field in error_line(capsys)


@pytest.mark.slow
def test_chat_continues_after_ctrl_c_ends_an_answer(chat_folder):
    with running(chat_folder) as (url, _):
        command = [sys.executable, "-m", "recurrent_depth.cli", "chat", "--url", f"{url}/v1", "--num-steps", "64"]
        process = subprocess.Popen(
            [*command, "--max-new-tokens", "1900"], text=True, env=os.environ,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        process.stdin.write("the quick\n")
        process.stdin.flush()
        assert process.stdout.read(1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        wait_until(lambda: metric(url, "requests_decoding") == 0)
        process.stdin.write("the lazy dog\n")
        process.stdin.flush()
        wait_until(lambda: metric(url, "requests_decoding") == 1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert len(out.splitlines()) >= 2
        assert err == ""


def test_generate_ends_its_turn_as_well(monkeypatch, capsys, answering_folder):
    monkeypatch.setattr(sys, "stdin", io.StringIO(QUESTION + "\n"))
    assert main(["generate", "--model", str(answering_folder), "--chat", "true", "--num-steps", "4"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["text"] == ANSWER
    assert len(row["steps"]) < 64
