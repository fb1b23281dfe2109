"""The HTTP application: OpenAI's chat completions, completions and models, health and metrics, over an `Engine`."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from recurrent_depth.serving.answer import Answer
from recurrent_depth.serving.config import Limits
from recurrent_depth.serving.effort import ServedEffort
from recurrent_depth.serving.engine import Engine, EngineStopped, Generation, Tokens
from recurrent_depth.serving.guard import Guard
from recurrent_depth.serving.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    Reply,
    usage,
)

_COLDEST = 1e-5
"""Below this temperature the most probable token is taken: logits divided by it would overflow."""


@dataclass
class Service:
    """The served model.

    Args:
        engine: generates the tokens.
        tokenizer: transformers tokenizer.
        name: name of the model for clients.
        limits: limits of requests.
        max_num_steps: largest num_steps of a request.
        efforts: what the values of reasoning_effort mean; empty: the field is refused.
        created: start time, in seconds since 1970.
        counts: tokens of prompts and answers so far.
        tokenizing: executor with one thread, to limit the memory that tokenizing long prompts takes.
    """

    engine: Engine
    tokenizer: Any
    name: str
    limits: Limits
    max_num_steps: int
    efforts: dict[str, ServedEffort] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))
    counts: Counter[str] = field(default_factory=Counter)
    tokenizing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tokenizing"))

    def check_model(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                404,
                f"model {name!r} is not served here; the served model is {self.name!r}",
                param="model",
                code="model_not_found",
            )

    async def chat_ids(self, request: ChatRequest) -> list[int]:
        """Return the ids of a conversation, up to the beginning of the answer."""
        if not self.tokenizer.chat_template:
            raise ApiError(400, f"{self.name} has no chat template; use /v1/completions", param="messages")
        messages = [message.for_template() for message in request.messages]
        return await self._tokenized(
            "messages",
            lambda: self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True),
        )

    async def prompt_ids(self, request: CompletionRequest) -> list[int]:
        """Return the ids of a prompt."""
        prompt = request.single_prompt()
        if isinstance(prompt, str):
            return await self._tokenized("prompt", lambda: self.tokenizer(prompt))
        size = self.engine.vocab_size
        if not all(0 <= token < size for token in prompt):
            raise ApiError(400, f"prompt holds a token id that is not in 0 to {size - 1}", param="prompt")
        return list(prompt)

    async def _tokenized(self, param: str, tokenize: Callable[[], Any]) -> list[int]:
        try:
            return (await asyncio.get_running_loop().run_in_executor(self.tokenizing, tokenize))["input_ids"]
        except Exception as error:  # for example lone surrogates, or an order of roles that the template refuses
            cause = f"{type(error).__name__}: {error}"
            raise ApiError(400, f"{param} cannot be tokenized ({cause})", param=param) from error

    def generation(self, request: GenerationRequest, ids: Sequence[int], new_tokens: int | None) -> Generation:
        """Return the generation for the engine; raise an ApiError if it exceeds a limit."""
        limits, engine = self.limits, self.engine
        effort = self._effort(request)
        num_steps = request.num_steps or effort.num_steps or engine.default_num_steps
        if num_steps > self.max_num_steps:
            raise ApiError(
                400, f"num_steps is {num_steps}; at most {self.max_num_steps} is allowed (limits.num_steps)",
                param="num_steps",
            )  # fmt: skip
        if new_tokens is not None and new_tokens > limits.new_tokens:
            raise ApiError(
                400, f"max_tokens is {new_tokens}; at most {limits.new_tokens} is allowed (limits.new_tokens)",
                param="max_tokens",
            )  # fmt: skip
        if not ids:
            raise ApiError(400, "the prompt is empty; give at least one token", param="prompt")
        room = {"context": engine.context, "memory of the server (limits.cache_gib)": engine.cache_tokens(num_steps)}
        for name, total in room.items():
            if len(ids) + (new_tokens or 1) > total:
                raise ApiError(
                    400, f"a prompt of {len(ids)} tokens with an answer of {new_tokens or 1} or more "
                    f"exceeds the {name} of {total} tokens; shorten the prompt or lower max_tokens",
                    code="context_length_exceeded",
                )  # fmt: skip
        allowed = min(limits.new_tokens, *(total - len(ids) for total in room.values()))
        temperature = request.temperature if request.temperature > _COLDEST else 0.0
        return Generation(
            tuple(ids), new_tokens or allowed, num_steps, temperature, request.top_k, request.top_p, request.seed,
            effort.thinking,
        )  # fmt: skip

    def _effort(self, request: GenerationRequest) -> ServedEffort:
        """Return what the request's reasoning_effort means."""
        name = request.reasoning_effort
        if name is None:
            return ServedEffort()
        if name not in self.efforts:
            raise ApiError(
                400, f"reasoning_effort is {name!r}, but {self.name} has no table for it; give num_steps instead",
                param="reasoning_effort",
            )  # fmt: skip
        return self.efforts[name]


class Run:
    """One request, from its submission to the last piece of its text. Call `close` after starting `pieces`."""

    def __init__(self, service: Service, generation: Generation, stops: Sequence[str]) -> None:
        decode = partial(service.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.service, self.generation = service, generation
        self.answer = Answer(decode, stops)
        self.deadline = asyncio.get_running_loop().time() + service.limits.seconds
        self.finish_reason = "length"
        self.tokens: Tokens | None = None

    async def pieces(self) -> AsyncIterator[str]:
        """Submit the request and yield its text as it is generated."""
        while not self.answer.stopped and (token := await self._next_token()) is not None:
            if token in self.service.engine.stop_ids:
                self.finish_reason = "stop"
            yield self.answer.push(token)
        yield self.answer.finish()
        if self.answer.stopped:
            self.finish_reason = "stop"

    async def _next_token(self) -> int | None:
        try:
            if self.tokens is None:
                self.tokens = self.service.engine.submit(self.generation)
            async with asyncio.timeout_at(self.deadline):
                return await anext(self.tokens, None)
        except TimeoutError:
            seconds = self.service.limits.seconds
            raise ApiError(408, f"the request took longer than {seconds:g} s (limits.seconds)") from None
        except EngineStopped as error:
            raise ApiError(503, str(error)) from error

    def close(self) -> None:
        """Cancel the request if it has not ended: the client has disconnected, or a stop text was found."""
        if self.tokens is not None:
            self.tokens.cancel()
        self.service.counts["prompt_tokens"] += len(self.generation.prompt)
        self.service.counts["generated_tokens"] += self.answer.tokens

    def usage(self) -> dict[str, int]:
        return usage(len(self.generation.prompt), self.answer.tokens)


class EventStream(StreamingResponse):
    """Send the answer of a run as server-sent events; close the run at the end or after an error."""

    def __init__(self, run: Run, reply: Reply, with_usage: bool) -> None:
        super().__init__(_events(run, reply, with_usage), media_type="text/event-stream")
        self.run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.run.close()


def build_app(service: Service, api_key: str | None) -> Guard:
    """Return the application inside its `Guard`."""
    app = FastAPI(title="recurrent-depth", description=f"Serves {service.name}. Depth: the field num_steps.")
    guard = Guard(app, service.limits, api_key)
    _add_errors(app)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest) -> Response:
        """Answer a conversation. Fields in addition to OpenAI's: num_steps, top_k."""
        service.check_model(request.model)
        request.check_fields()
        ids = await service.chat_ids(request)
        return await _respond(service, request, ids, request.new_tokens(), Reply("chat.completion", service.name))

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest) -> Response:
        """Continue a prompt. Fields in addition to OpenAI's: num_steps, top_k."""
        service.check_model(request.model)
        request.check_fields()
        ids = await service.prompt_ids(request)
        return await _respond(service, request, ids, request.new_tokens(), Reply("text_completion", service.name))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _model_card(service)

    @app.get("/health")
    async def health() -> JSONResponse:
        healthy = service.engine.healthy()
        return JSONResponse({"status": "ok" if healthy else "stopped"}, 200 if healthy else 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        """Return counters and gauges in the text format of Prometheus."""
        return PlainTextResponse(_metrics(service, guard), media_type="text/plain; version=0.0.4")

    return guard


async def _respond(
    service: Service, request: GenerationRequest, ids: Sequence[int], new_tokens: int | None, reply: Reply
) -> Response:
    stops = request.stop_texts()
    run = Run(service, service.generation(request, ids, new_tokens), stops)
    if request.stream:
        with_usage = request.stream_options is not None and request.stream_options.include_usage
        return EventStream(run, reply, with_usage)
    try:
        text = "".join([piece async for piece in run.pieces()])
    finally:
        run.close()
    return JSONResponse(reply.whole(text, run.finish_reason, run.usage()))


async def _events(run: Run, reply: Reply, with_usage: bool) -> AsyncIterator[str]:
    """Yield server-sent events. An error after the first event is sent as an event: the status is already sent."""
    try:
        if reply.chat:
            yield _event(reply.chunk("", first=True))
        async for piece in run.pieces():
            if piece:
                yield _event(reply.chunk(piece))
        yield _event(reply.chunk(None, run.finish_reason))
        if with_usage:
            yield _event(reply.usage_chunk(run.usage()))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body())


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _model_card(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "recurrent-depth",
        "max_model_len": service.engine.context,
        "num_steps": service.engine.default_num_steps,
        "max_num_steps": service.max_num_steps,
        "reasoning_effort": {
            name: {
                "num_steps": effort.num_steps or service.engine.default_num_steps,
                "thinking_tokens": None if effort.thinking is None else effort.thinking.at_most,
            }
            for name, effort in service.efforts.items()
        },
    }


def _metrics(service: Service, guard: Guard) -> str:
    decoding, waiting = service.engine.load()
    lines = ["# TYPE recurrent_depth_responses_total counter"]
    lines += [f'recurrent_depth_responses_total{{status="{s}"}} {n}' for s, n in sorted(guard.statuses.items())]
    values = {
        ("requests_in_progress", "gauge"): guard.in_progress,
        ("requests_decoding", "gauge"): decoding,
        ("requests_waiting", "gauge"): waiting,
        ("prompt_tokens_total", "counter"): service.counts["prompt_tokens"],
        ("generated_tokens_total", "counter"): service.counts["generated_tokens"],
    }
    for (name, kind), value in values.items():
        lines += [f"# TYPE recurrent_depth_{name} {kind}", f"recurrent_depth_{name} {value}"]
    return "\n".join(lines) + "\n"


def _add_errors(app: FastAPI) -> None:
    """Register handlers that send every error in OpenAI's format."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        message = f"{place}: {first['msg']}" if place else str(first["msg"])
        return JSONResponse(ApiError(400, message, param=place or None).body(), 400)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(ApiError(500, "internal error; see the server's log").body(), 500)
