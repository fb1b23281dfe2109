"""`recurrent-depth chat`: talk to a model on a terminal, through a server of `recurrent-depth serve`."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from openai import APIConnectionError, APIError, APIStatusError, AuthenticationError, BadRequestError, OpenAI
from openai.types import Model

from recurrent_depth.serving.config import KEY_VARIABLE, ChatConfig, Limits, ServeConfig

_CONNECT_SECONDS, _ANSWER_SECONDS = 10, 600
_LONGEST = 256  # tokens of an answer by default


def chat(config: ChatConfig) -> None:
    """Read questions from standard input and print the answers as they are generated."""
    if config.url is not None:
        _converse(config, _client(config, config.url))
        return
    with _own_server(config) as url:
        _converse(config, _client(config, url))


@contextmanager
def _own_server(config: ChatConfig) -> Iterator[str]:
    """Start a server for this conversation, without limits and logs; yield its URL."""
    from transformers.utils import logging

    from recurrent_depth.serving.serve import Server, listen, load

    logging.set_verbosity_error()
    limits = Limits(num_steps=2**30, new_tokens=2**30, cache_gib=2.0**20, seconds=2.0**30, requests=4)
    assert config.model is not None
    with listen("127.0.0.1", 0) as listener:
        options = ServeConfig(config.model, device=config.device, engine="transformers", limits=limits)
        print(f"loading {config.model}", file=sys.stderr, flush=True)
        server = Server(options, load(options), "critical")
        server.start(listener)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.stop()


def _client(config: ChatConfig, url: str) -> OpenAI:
    key = config.api_key or os.environ.get(KEY_VARIABLE) or "none"
    return OpenAI(base_url=url, api_key=key, max_retries=0, timeout=_ANSWER_SECONDS)


def _served_model(config: ChatConfig, client: OpenAI) -> Model:
    """Return the model at the server.

    Raises:
        OSError: if no server answers.
        ValueError: if the server requires another key, or serves another model.
    """
    try:
        served = {model.id: model for model in client.models.list(timeout=_CONNECT_SECONDS)}
    except APIConnectionError as error:
        raise OSError(
            f"url: no server answers at {client.base_url} ({error.__cause__ or error}); start one with "
            "recurrent-depth serve, or fix the address"
        ) from error
    except AuthenticationError as error:
        raise ValueError(f"api_key: the server at {client.base_url} refused it; give its key with --api-key") from error
    except APIError as error:
        raise ValueError(
            f"url: {client.base_url} is not an OpenAI-compatible server ({error}); it usually ends in /v1"
        ) from error
    if config.url is None or config.model is None:
        return next(iter(served.values()))
    if config.model not in served:
        raise ValueError(f"model: {config.model!r} is not served at {client.base_url}; served are {', '.join(served)}")
    return served[config.model]


def _converse(config: ChatConfig, client: OpenAI) -> None:
    model = _served_model(config, client)
    messages: list[Any] = [] if config.system is None else [{"role": "system", "content": config.system}]
    while question := _ask():
        messages.append({"role": "user", "content": question})
        answer = ""
        try:
            for piece in _answer(config, client, model, messages):
                print(piece, end="", flush=True)
                answer += piece
        except KeyboardInterrupt:
            print(" ...", end="", flush=True)
        except APIError as error:
            print(f"error: {_explained(error, client)}", file=sys.stderr, flush=True)
        print(flush=True)
        if answer:
            messages.append({"role": "assistant", "content": answer})
        else:
            messages.pop()  # a question without an answer is not part of the conversation


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _answer(config: ChatConfig, client: OpenAI, model: Model, messages: list[Any]) -> Iterator[str]:
    """Yield the answer as it is generated. Drop the oldest messages if the conversation exceeds the context."""
    context = getattr(model, "max_model_len", None)  # vLLM's servers and ours say it
    longest = config.max_new_tokens or (_LONGEST if context is None else min(_LONGEST, context // 2))
    depth = None if config.num_steps is None else {"num_steps": config.num_steps}
    while True:
        try:
            stream = client.chat.completions.create(
                model=model.id, messages=messages, stream=True, max_tokens=longest,
                temperature=config.temperature, extra_body=depth,
            )  # fmt: skip
            break
        except BadRequestError as error:
            if error.code != "context_length_exceeded" or not _forget_oldest(messages):
                raise
            print("(the context is full: the oldest question and answer are forgotten)", file=sys.stderr, flush=True)
    with stream:  # closing the stream cancels the request at the server
        for event in stream:
            if event.choices and event.choices[0].delta.content:
                yield event.choices[0].delta.content


def _forget_oldest(messages: list[Any]) -> bool:
    """Remove the oldest question and its answer. Return False if there is only the last question."""
    first = 1 if messages[0]["role"] == "system" else 0
    if len(messages) - first < 3:
        return False
    del messages[first : first + 2]
    return True


def _explained(error: APIError, client: OpenAI) -> str:
    if isinstance(error, APIConnectionError):
        return f"no server answers at {client.base_url}; ask again when it is back"
    if isinstance(error, APIStatusError) and isinstance(error.body, dict):
        return str(error.body.get("message", error))
    return str(error)
