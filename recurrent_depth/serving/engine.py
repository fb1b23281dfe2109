"""What makes the tokens of a server: an interface, and this package's decoding behind it.

`app.py` needs an `Engine` alone. Another engine (vLLM) replaces `DecoderEngine` by a class with the same attributes and
a `submit` that returns an asynchronous iterator of tokens with a `cancel`.
"""

import asyncio
import logging
import random
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Protocol

from recurrent_depth.generation.cache import cache_bytes
from recurrent_depth.generation.engine import Decoder
from recurrent_depth.generation.request import Decoding
from recurrent_depth.hf.modeling import RecurrentDepthForCausalLM
from recurrent_depth.serving.config import Limits

_log = logging.getLogger(__name__)


class EngineStopped(RuntimeError):
    """The engine ends, or has failed, before the last token of a request."""


@dataclass(frozen=True)
class Generation:
    """What one request asks of an engine: ids to continue, and how.

    Args:
        prompt: ids; at least one.
        max_new_tokens: most new tokens; a stop id of the engine ends the request earlier.
        num_steps: core iterations per token.
        temperature, top_k, top_p: of sampling; temperature 0 takes the likeliest token.
        seed: of sampling; None draws one.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    num_steps: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None


class Tokens(Protocol):
    """The tokens of a request as they come."""

    def __aiter__(self) -> AsyncIterator[int]: ...

    async def __anext__(self) -> int: ...

    def cancel(self) -> None:
        """End the request within one token."""


class Engine(Protocol):
    """Makes tokens.

    Attributes:
        stop_ids: tokens that end a request; they are among its tokens.
        context: tokens of prompt and answer together, at most.
        vocab_size: ids are below it.
        default_num_steps: core iterations where a request does not say.
    """

    stop_ids: frozenset[int]
    context: int
    vocab_size: int
    default_num_steps: int

    def submit(self, generation: Generation) -> Tokens:
        """Start a request; it is to be called in a running event loop."""

    def cache_tokens(self, num_steps: int) -> int:
        """Tokens, prompt and answer, that fit the memory for keys and values at a depth."""

    def load(self) -> tuple[int, int]:
        """Requests that are decoded now, and that wait."""

    def healthy(self) -> bool:
        """Whether requests are worked on."""

    def close(self, seconds: float) -> bool:
        """End all requests, with an `EngineStopped` each, and refuse new ones. Return True once that is done, False
        where it takes longer than `seconds`."""


class _Request:
    """A request on its way between the event loop, which reads its tokens, and the decoding thread."""

    def __init__(self, generation: Generation, stop_ids: frozenset[int]) -> None:
        self.generation, self.stop_ids = generation, stop_ids
        self.cancelled = self.done = False
        self.count = 0
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[int | Exception] = asyncio.Queue()

    def __aiter__(self) -> "_Request":
        return self

    async def __anext__(self) -> int:
        item = await self.queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> None:
        self.cancelled = True

    def take(self, token: int) -> bool:
        """Pass a token on, from the decoding thread. Return True where it was the last one."""
        if self.cancelled or self.done:
            return True
        self._put(token)
        self.count += 1
        if self.count >= self.generation.max_new_tokens or token in self.stop_ids:
            self.end(StopAsyncIteration())
        return self.done

    def end(self, reason: Exception) -> None:
        if not self.done:
            self.done = True
            self._put(reason)

    def _put(self, item: int | Exception) -> None:
        try:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:  # the event loop has ended, and its clients with it
            self.cancelled = True


class DecoderEngine:
    """Decodes requests in batches, in a thread.

    Requests that wait are decoded together as far as they fit: equal sampling, room in the context and in the cache.
    A batch is decoded to its end before the next one starts.
    """

    def __init__(self, model: RecurrentDepthForCausalLM, stop_ids: frozenset[int], limits: Limits) -> None:
        config = model.config
        self.stop_ids, self.context, self.vocab_size = stop_ids, config.block_size, config.vocab_size
        self.default_num_steps = config.num_steps or config.mean_recurrence
        if self.default_num_steps > limits.num_steps:
            raise ValueError(
                f"limits.num_steps is {limits.num_steps}, but the model iterates {self.default_num_steps} times by "
                "default; raise the limit"
            )
        self.limits = limits
        self.decoder = Decoder(model)
        self.waiting: deque[_Request] = deque()
        self.batch: list[_Request] = []
        self.closed = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="decoding", daemon=True)
        self.thread.start()

    def submit(self, generation: Generation) -> Tokens:
        request = _Request(generation, self.stop_ids)
        with self.changed:
            if self.closed:
                raise EngineStopped("the server is shutting down")
            self.waiting.append(request)
            self.changed.notify()
        return request

    def cache_tokens(self, num_steps: int) -> int:
        config, dtype = self.decoder.model.model_config, self.decoder.model.lm_head.weight.dtype
        return int(self.limits.cache_gib * 2**30 / cache_bytes(config, 1, 1, num_steps, dtype=dtype))

    def load(self) -> tuple[int, int]:
        with self.changed:
            return sum(not r.done and not r.cancelled for r in self.batch), sum(not r.cancelled for r in self.waiting)

    def healthy(self) -> bool:
        return self.thread.is_alive() and not self.closed

    def close(self, seconds: float) -> bool:
        with self.changed:
            self.closed = True
            requests = [*self.batch, *self.waiting]
            self.waiting.clear()
            self.changed.notify()
        self._end(requests, EngineStopped("the server is shutting down"))  # a pass that runs may take long to notice
        self.thread.join(timeout=seconds)
        return not self.thread.is_alive()

    def _work(self) -> None:
        while batch := self._next_batch():
            try:
                self._decode(batch)
            except Exception as error:  # one batch fails, the server goes on
                _log.exception("decoding a batch of %d requests failed", len(batch))
                self._end(batch, EngineStopped(f"decoding failed ({type(error).__name__}); see the server's log"))

    def _next_batch(self) -> list[_Request]:
        """Wait for requests; return the first one and those that fit beside it, or none once the engine is closed."""
        with self.changed:
            self.batch = []
            while not self.closed:
                self.waiting = deque(request for request in self.waiting if not request.cancelled)
                if self.waiting:
                    for request in list(self.waiting):
                        if len(self.batch) < self.limits.batch and self._fits([*self.batch, request]):
                            self.batch.append(request)
                            self.waiting.remove(request)
                    return self.batch
                self.changed.wait()
            return []

    def _fits(self, batch: list[_Request]) -> bool:
        first, asked = batch[0].generation, [request.generation for request in batch]
        sampling = (first.temperature, first.top_k, first.top_p)
        length = max(len(g.prompt) for g in asked) + max(g.max_new_tokens for g in asked)
        rows = self.cache_tokens(max(g.num_steps for g in asked)) // length
        equal = all((g.temperature, g.top_k, g.top_p) == sampling for g in asked)
        return len(batch) == 1 or (equal and length <= self.context and len(batch) <= rows)

    def _decode(self, batch: list[_Request]) -> None:
        asked = [request.generation for request in batch]
        options = Decoding(
            max_new_tokens=max(g.max_new_tokens for g in asked),
            num_steps=[g.num_steps for g in asked],
            temperature=asked[0].temperature,
            top_k=asked[0].top_k,
            top_p=asked[0].top_p,
            stop=tuple(self.stop_ids),
        )
        seeds = [_row_name(g.seed) for g in asked]

        def on_token(row: int, token: int) -> bool:
            return batch[row].take(token) or self.closed

        self.decoder.generate([g.prompt for g in asked], options, requests=seeds, on_token=on_token)
        self._end(batch, StopAsyncIteration())

    @staticmethod
    def _end(requests: Iterable[_Request], reason: Exception) -> None:
        for request in requests:
            request.end(reason)


def _row_name(seed: int | None) -> int:
    """The name (32 bits) that the draws of a request are a function of."""
    return random.getrandbits(32) if seed is None else (seed ^ (seed >> 32)) & 0xFFFFFFFF
