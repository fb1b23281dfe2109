"""Start servers and send requests to them."""

import http.client
import json
import os
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager

import pytest

from recurrent_depth.serving.config import ServeConfig
from recurrent_depth.serving.serve import Server, listen, load
from vllm_engines import SETTINGS

BOTH_ENGINES = ["transformers", pytest.param("vllm", marks=pytest.mark.vllm)]


@contextmanager
def running(folder, **options):
    """Yield the address of a server of a folder in this process, and the server."""
    if options.get("engine") == "vllm":
        pytest.importorskip("vllm")
        os.environ.update(SETTINGS)
    config = ServeConfig(str(folder), **({"device": "cpu", "engine": "transformers"} | options))
    with listen("127.0.0.1", 0) as listener:
        server = Server(config, load(config), "critical")
        server.start(listener)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
        finally:
            server.stop()
    assert not server.thread.is_alive()


def metric(url, name, key=""):
    """Return a value of the server's /metrics; 0 if there is none with that name."""
    request = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=10) as response:
        lines = response.read().decode().splitlines()
    return float(next((line.split()[-1] for line in lines if line.startswith(f"recurrent_depth_{name}")), 0))


def answers(url):
    """Return whether a server answers at this address."""
    try:
        return ask(url, "/health", method="GET")[0] == 200
    except OSError:
        return False


def wait_until(condition, seconds=60):
    """Wait until a condition is true; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.01)


def ask(url, path="/v1/completions", body=None, method="POST", key=None, headers=None, **fields):
    """Return status and JSON of a request. `body` is sent unchanged; without it, `fields` extend a valid request."""
    if body is None and method == "POST":
        body = json.dumps({"model": "small", "prompt": "the quick", "max_tokens": 4, "temperature": 0} | fields)
    address = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    try:
        headers = {"Content-Type": "application/json"} | (headers or {})
        headers |= {} if key is None else {"Authorization": f"Bearer {key}"}
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"null")
    finally:
        connection.close()


def open_stream(url, key=None, **fields):
    """Return the connection of a streaming completion; closing it is a disconnect."""
    address = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    body = {"model": "small", "prompt": "the quick", "temperature": 0, "stream": True} | fields
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection


def start_process(folder, *options, engine="transformers"):
    """Return a server in a separate process, and its address."""
    command = [sys.executable, "-m", "recurrent_depth.cli", "serve", "--model", str(folder), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--served-name", "small", "--device", "cpu", "--engine", engine, *options], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | SETTINGS,
    )  # fmt: skip
    line = next(line for line in process.stdout if line.startswith("serving"))
    url = line.split(" on ")[1].split("/v1")[0]
    wait_until(lambda: answers(url))
    return process, url
