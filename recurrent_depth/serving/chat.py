"""`recurrent-depth chat`: talk to a model on a terminal, through the server that others would use."""

import json
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from recurrent_depth.serving.serve import ServeConfig, servable, start


@dataclass(frozen=True)
class ChatConfig:
    """Talk to a model; an empty line or end of input ends the conversation.

    Args:
        model: run folder, export or hub name; with a url: the model's name there.
        url: a server that runs already, for example http://localhost:8000/v1; null starts one for this chat.
        num_steps: steps of the core; null takes the model's.
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token.
        system: system message; null for none.
        device: auto, cpu or cuda.
    """

    model: str
    url: str | None = None
    num_steps: int | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    system: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; it must be at least 1")


def chat(config: ChatConfig) -> None:
    """Read questions from standard input, write answers as they come."""
    if config.url is not None:
        _converse(config, config.url, config.model)
        return
    with servable(config.model) as folder:
        port = _free_port()
        server = start(ServeConfig(folder, port=port, device=config.device), folder, background=True)
        try:
            url = f"http://localhost:{port}"
            _wait_until_up(url)
            _converse(config, f"{url}/v1", folder)
        finally:
            server.kill_server()


def _converse(config: ChatConfig, url: str, model: str) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none")
    messages: list[Any] = [] if config.system is None else [{"role": "system", "content": config.system}]
    while question := _ask():
        messages.append({"role": "user", "content": question})
        answer = ""
        for piece in _answer(client, config, model, messages):
            print(piece, end="", flush=True)
            answer += piece
        print(flush=True)
        messages.append({"role": "assistant", "content": answer})


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _answer(client: Any, config: ChatConfig, model: str, messages: list[Any]) -> Iterator[str]:
    generation = {
        "max_new_tokens": config.max_new_tokens,
        "do_sample": config.temperature > 0,
        **({"temperature": config.temperature} if config.temperature > 0 else {}),
        **({"num_steps": config.num_steps} if config.num_steps is not None else {}),
    }
    stream = client.chat.completions.create(
        model=model, messages=messages, stream=True, extra_body={"generation_config": json.dumps(generation)}
    )
    for event in stream:
        if event.choices and event.choices[0].delta.content:
            yield event.choices[0].delta.content


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def _wait_until_up(url: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1):
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"the server at {url} did not come up within {seconds:.0f} s")
