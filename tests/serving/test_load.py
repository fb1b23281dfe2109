"""A server in a separate process under load and abuse: it always answers, and its memory stays bounded."""

import concurrent.futures
import json
import random
import socket
import threading
import urllib.parse
from pathlib import Path

import pytest

from servers import BOTH_ENGINES, ask, metric, open_stream, start_process, wait_until

CLIENTS, ROUNDS, IDLE = 32, 4, 1000
MEBIBYTES_ALLOWED = 150


def peak(process):
    """Return the peak resident memory of a process, in MiB: of the server, not of vLLM, whose cache fills."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


def stream_and_maybe_disconnect(url, seed):
    """Stream an answer; half of the clients disconnect at a random token. Return the number of complete answers."""
    draw, complete = random.Random(seed), 0
    for _ in range(ROUNDS):
        tokens = draw.randint(20, 80)
        connection = open_stream(
            url, max_tokens=tokens, num_steps=draw.choice([1, 4, 8]), temperature=draw.choice([0, 1])
        )
        disconnect_after = draw.choice([None, draw.randint(0, 20)])
        response = connection.getresponse() if disconnect_after != 0 else None
        events = []
        while response is not None and (line := response.readline()):
            events += [line] if line.startswith(b"data: ") else []
            if disconnect_after is not None and len(events) >= disconnect_after:
                break
        connection.close()
        if disconnect_after is None:
            assert events[-1] == b"data: [DONE]\n", events[-3:]
            complete += 1
    return complete


ABUSES = [
    ({"path": "/load_model", "body": json.dumps({"model": "gpt2"})}, 404),
    ({"path": "/reset", "body": "{}"}, 404),
    ({"num_steps": 10**6}, 400),
    ({"body": b"x" * 60_000_000}, 413),
    ({"body": json.dumps({"model": "small", "prompt": "a" * 250_000})}, 400),
    ({"prompt": [40] * 3000}, 400),
    ({"body": b'{"model": "small", '}, 400),
    ({"body": b"[" * 100_000}, 400),
    ({"model": "gpt-4"}, 404),
    ({"model": "../../etc/passwd"}, 404),
    ({"path": "/v1/models/..%2f..%2fetc%2fpasswd", "method": "GET"}, 404),
]


@pytest.mark.slow
@pytest.mark.parametrize("engine", BOTH_ENGINES)
def test_server_answers_through_load_and_abuse_with_bounded_memory(chat_folder, engine):
    process, url = start_process(chat_folder, "--limits.num_steps", "64", "--limits.cache_gib", "1", engine=engine)
    healthy, done = [], threading.Event()

    def watch():
        while not done.wait(0.2):
            healthy.append(ask(url, "/health", method="GET")[0])

    try:
        ask(url, max_tokens=20)
        before = peak(process)
        watcher = threading.Thread(target=watch)
        watcher.start()
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            complete = sum(pool.map(lambda seed: stream_and_maybe_disconnect(url, seed), range(CLIENTS)))
        assert complete > CLIENTS
        wait_until(lambda: metric(url, "requests_in_progress") == 0)
        under_load = peak(process)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = pool.map(lambda abuse: ask(url, **abuse[0])[0], ABUSES * 4)
            assert list(answers) == [status for _, status in ABUSES] * 4
        address = urllib.parse.urlsplit(url)
        idle = [socket.create_connection((address.hostname, address.port), timeout=30) for _ in range(IDLE)]
        assert ask(url, max_tokens=4)[0] == 200
        for connection in idle:
            connection.close()
        assert metric(url, "requests_in_progress") == 0
        done.set()
        watcher.join()
        assert set(healthy) == {200}
        print(f"peak memory: {before:.0f} MiB idle, {under_load:.0f} under load, {peak(process):.0f} after the abuses")
        assert peak(process) - before < MEBIBYTES_ALLOWED
    finally:
        done.set()
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0
