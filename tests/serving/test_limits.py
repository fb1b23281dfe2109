"""Requests that a server refuses, and that it continues to serve."""

import concurrent.futures
import json
import signal
import socket
import urllib.parse
import urllib.request

import pytest

from recurrent_depth.cli import main
from recurrent_depth.serving.config import Limits
from servers import ask, metric, open_stream, running, start_process, wait_until
from support import error_line

KEY = "secret"


@pytest.fixture
def asked(strict_server):
    """`ask` for the strict server, with its key. After the test the server must still answer."""

    def strict(*args, **options):
        return ask(strict_server, *args, **({"key": KEY} | options))

    yield strict
    assert strict()[0] == 200


def assert_refused(answer, status, *words):
    assert answer[0] == status, answer
    error = answer[1]["error"]
    assert error["type"] == "invalid_request_error"
    assert all(word in error["message"] for word in words), error["message"]


FIELDS = {
    "num_steps far beyond": ({"num_steps": 10**6}, ("num_steps is 1000000", "at most 8", "limits.num_steps")),
    "num_steps above the limit": ({"num_steps": 9}, ("at most 8",)),
    "num_steps 0": ({"num_steps": 0}, ("num_steps", "greater than or equal to 1")),
    "num_steps a fraction": ({"num_steps": 1.5}, ("num_steps", "integer")),
    "num_steps a text": ({"num_steps": "deep"}, ("num_steps", "integer")),
    "num_steps a pair": ({"num_steps": [1, 2]}, ("num_steps",)),
    "max_tokens above the limit": ({"max_tokens": 101}, ("at most 100", "limits.new_tokens")),
    "max_tokens 0": ({"max_tokens": 0}, ("max_tokens",)),
    "max_tokens enormous": ({"max_tokens": 10**30}, ("max_tokens",)),
    "temperature -1": ({"temperature": -1}, ("temperature",)),
    "temperature 3": ({"temperature": 3}, ("temperature",)),
    "temperature a text": ({"temperature": "hot"}, ("temperature",)),
    "top_p 0": ({"top_p": 0}, ("top_p",)),
    "top_k 0": ({"top_k": 0}, ("top_k",)),
    "seed beyond 64 bits": ({"seed": 2**64}, ("seed",)),
    "n 2": ({"n": 2}, ("n is 2",)),
    "stop empty": ({"stop": ""}, ("stop",)),
    "stop of many": ({"stop": ["a"] * 17}, ("at most 16",)),
    "stop a number": ({"stop": 5}, ("stop",)),
    "stream a text": ({"stream": "perhaps"}, ("stream",)),
    "an unknown field": ({"temprature": 1}, ("unknown field 'temprature'",)),
    "model absent": ({"model": None}, ("model",)),
    "prompt empty": ({"prompt": ""}, ("empty",)),
    "prompt without ids": ({"prompt": []}, ("empty",)),
    "prompt of two": ({"prompt": ["a", "b"]}, ("2 prompts",)),
    "prompt absent": ({"prompt": None}, ("prompt",)),
    "ids beyond the vocabulary": ({"prompt": [5, 320]}, ("0 to 319",)),
    "ids below 0": ({"prompt": [-1]}, ("0 to 319",)),
    "a lone surrogate": ({"prompt": "\ud800"}, ("tokenized",)),
}  # fmt: skip


@pytest.mark.parametrize("case", FIELDS)
def test_field_beyond_what_is_allowed_is_a_400_with_the_reason(asked, case):
    fields, words = FIELDS[case]
    assert_refused(asked(**fields), 400, *words)
    assert_refused(asked(**fields, **({} if "stream" in fields else {"stream": True})), 400, *words)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        [{"role": "user"}],
        [{"role": "wizard", "content": "hello"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://example.com"}}]}],
        [{"role": "user", "content": None}],
    ],
)
def test_invalid_messages_are_a_400(asked, messages):
    body = json.dumps({"model": "small", "messages": messages})
    assert_refused(asked("/v1/chat/completions", body=body), 400, "messages")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1, 2]",
        b"null",
        b'"text"',
        b"\xff\xfe{}",
        b"[" * 1999,
        b'{"model": "small", "prompt": "a", "top_p": NaN}',
        b'{"model": "small", "prompt": "a", "temperature": Infinity}',
    ],
)
def test_invalid_body_is_a_400(asked, body):
    status, answer = asked(body=body)
    assert status == 400
    assert answer["error"]["message"]


def test_context_overflow_is_a_400_that_says_so(server):
    for fields in ({"prompt": [40] * 2048}, {"prompt": [40] * 3000}, {"prompt": [40] * 2000, "max_tokens": 100}):
        answer = ask(server, **fields)
        assert_refused(answer, 400, "exceeds the context of 2048 tokens", "shorten the prompt")
        assert answer[1]["error"]["code"] == "context_length_exceeded"
    assert ask(server, prompt=[40] * 2047, max_tokens=1, num_steps=1)[0] == 200


def test_request_beyond_the_cache_memory_is_a_400(chat_folder):
    with running(chat_folder, served_name="small", limits=Limits(cache_gib=2e-4)) as (url, _):
        assert_refused(ask(url, prompt=[40] * 200), 400, "limits.cache_gib")
        assert ask(url)[0] == 200


@pytest.mark.parametrize("path", ["/load_model", "/reset", "/v1/responses", "/v1/embeddings", "/", "/../../etc/passwd"])
def test_other_routes_are_a_404(asked, path):
    body = json.dumps({"model": "huggingface/anything", "model_id_or_path": "/etc"})
    assert_refused(asked(path, body=body), 404, path)
    assert_refused(asked(path, method="GET"), 404, path)


def test_wrong_method_is_a_405(asked):
    assert_refused(asked(method="GET"), 405, "Method Not Allowed")


@pytest.mark.parametrize("name", ["gpt-4", "openai/gpt", "../small", "/etc/passwd", "./small", "small/", ""])
def test_other_models_are_a_404(asked, chat_folder, name):
    for model in (name, str(chat_folder)):
        answer = asked(model=model)
        assert_refused(answer, 404, "the served model is 'small'")
        assert answer[1]["error"]["code"] == "model_not_found"
    if name:
        assert asked(f"/v1/models/{urllib.parse.quote(name, safe='')}", method="GET")[0] == 404


@pytest.mark.parametrize("key", [None, "wrong", "", "Secret"])
def test_server_with_a_key_asks_for_it(asked, strict_server, key):
    for path, method in (("/v1/completions", "POST"), ("/v1/models", "GET"), ("/metrics", "GET"), ("/docs", "GET")):
        assert_refused(ask(strict_server, path, method=method, key=key), 401, "Authorization: Bearer")
    assert ask(strict_server, "/health", method="GET")[0] == 200


def test_key_may_come_from_the_environment(chat_folder, monkeypatch):
    monkeypatch.setenv("RECURRENT_DEPTH_API_KEY", "hidden")
    with running(chat_folder, served_name="small") as (url, _):
        assert ask(url)[0] == 401
        assert ask(url, key="hidden")[0] == 200


def test_large_body_is_a_413(asked):
    large = json.dumps({"model": "small", "prompt": "a" * 3000, "max_tokens": 4})
    assert_refused(asked(body=large), 413, "2000 bytes", "limits.body_bytes")
    pieces = [large.encode()[i : i + 100] for i in range(0, len(large), 100)]
    assert_refused(asked(body=iter(pieces)), 413, "limits.body_bytes")
    assert_refused(asked(body=b"x" * 60_000_000), 413, "limits.body_bytes")


def test_slow_body_is_a_408(asked, strict_server):
    address = urllib.parse.urlsplit(strict_server)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 100\r\n\r\n{{"
        )
        connection.sendall(head.encode())
        answer = connection.recv(4096).decode()
    assert answer.startswith("HTTP/1.1 408")


def test_more_requests_than_allowed_get_a_429(strict_server):
    streams = [open_stream(strict_server, KEY, max_tokens=100, num_steps=8) for _ in range(2)]
    wait_until(lambda: metric(strict_server, "requests_in_progress", KEY) == 2)
    assert_refused(ask(strict_server, key=KEY), 429, "limits.requests")
    assert ask(strict_server, "/v1/models", method="GET", key=KEY)[0] == 200
    for stream in streams:
        stream.close()
    wait_until(lambda: metric(strict_server, "requests_in_progress", KEY) == 0)
    assert ask(strict_server, key=KEY)[0] == 200


def test_streaming_request_is_cancelled_after_a_disconnect(chat_folder):
    with running(chat_folder, served_name="small", limits=Limits(batch=1)) as (url, _):
        # one is decoded, one waits; neither would end soon
        decoded, waiting = (open_stream(url, max_tokens=1900, num_steps=64) for _ in range(2))
        wait_until(lambda: metric(url, "requests_waiting") == 1 and metric(url, "requests_decoding") == 1)
        waiting.close()
        wait_until(lambda: metric(url, "requests_waiting") == 0)
        assert metric(url, "requests_decoding") == 1
        decoded.close()
        wait_until(lambda: metric(url, "requests_decoding") == 0)
        assert metric(url, "requests_in_progress") == 0
        assert metric(url, "generated_tokens_total") < 1900
        assert ask(url)[0] == 200


def test_whole_answer_is_cancelled_after_a_disconnect(chat_folder):
    with running(chat_folder, served_name="small") as (url, _):
        connection = open_stream(url, max_tokens=1900, num_steps=64, stream=False)
        wait_until(lambda: metric(url, "requests_decoding") == 1)
        connection.close()
        wait_until(lambda: metric(url, "requests_decoding") == 0)


def test_request_beyond_the_time_limit_ends_with_the_reason(chat_folder):
    with running(chat_folder, served_name="small", limits=Limits(seconds=0.5)) as (url, _):
        assert_refused(ask(url, max_tokens=1900, num_steps=64), 408, "limits.seconds")
        stream = open_stream(url, max_tokens=1900, num_steps=64).getresponse()
        assert stream.status == 200
        events = stream.read().decode().strip().split("\n\n")
        assert "limits.seconds" in json.loads(events[-1].removeprefix("data: "))["error"]["message"]
        wait_until(lambda: metric(url, "requests_decoding") == 0)


def test_server_continues_after_a_failure_of_its_engine(chat_folder):
    with running(chat_folder, served_name="small") as (url, server):
        embedding = server.service.engine.decoder.model.transformer.wte
        weight = embedding.weight.data
        embedding.weight.data = weight[:1]  # no other token can be looked up
        status, answer = ask(url)
        assert (status, answer["error"]["type"]) == (503, "server_error")
        assert "decoding failed" in answer["error"]["message"]
        embedding.weight.data = weight
        assert ask(url)[0] == 200


def test_deep_requests_do_not_block_other_requests(chat_folder):
    with running(chat_folder, served_name="small") as (url, _):
        stream = open_stream(url, max_tokens=1900, num_steps=64)
        wait_until(lambda: metric(url, "requests_decoding") == 1)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: ask(url, "/v1/models", method="GET")[0], range(8)))
        assert answers == [200] * 8
        stream.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "engine"),
    [
        (signal.SIGTERM, "transformers"),
        (signal.SIGINT, "transformers"),
        pytest.param(signal.SIGTERM, "vllm", marks=pytest.mark.vllm),
    ],
)
def test_signal_ends_the_server_and_its_requests(chat_folder, number, engine):
    options = ["--limits.shutdown_seconds", "1", "--limits.num_steps", "64", "--limits.cache_gib", "1"]
    process, url = start_process(chat_folder, *options, engine=engine)
    stream = open_stream(url, max_tokens=1900, num_steps=64)
    waiting = open_stream(url, max_tokens=4, num_steps=64, stream=False)
    wait_until(lambda: metric(url, "requests_in_progress") == 2)
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert out.splitlines()[-1] == "stopped"
    assert "shutting down" in stream.getresponse().read().decode()
    assert waiting.getresponse().status in (200, 503)


def test_port_in_use_is_explained(chat_folder, server, capsys):
    port = urllib.parse.urlsplit(server).port
    options = ["--model", str(chat_folder), "--host", "127.0.0.1"]
    assert main(["serve", *options, "--port", str(port)]) != 0
    assert f"127.0.0.1:{port} cannot be listened on" in error_line(capsys)
    assert main(["serve", *options, "--port", "99999"]) != 0
    assert "port is 99999" in error_line(capsys)
    assert main(["serve", "--model", str(chat_folder), "--host", "no.such.host.invalid"]) != 0
    assert "host" in error_line(capsys)


@pytest.mark.parametrize("options", [["--device", "bogus"], ["--limits.num_steps", "2"], ["--limits.batch", "0"]])
def test_serve_explains_what_cannot_work(chat_folder, capsys, options):
    assert main(["serve", "--model", str(chat_folder), "--port", "0", *options]) != 0
    assert options[0].removeprefix("--") in error_line(capsys)
