"""The engine of a server: the interface `Engine`, and its implementation with the decoder of this package.

`app.py` uses only the interface. The implementation with vLLM is in recurrent_depth/serving/vllm/engine.py.
"""

import asyncio
import logging
import random
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from recurrent_depth.generation.cache import cache_bytes
from recurrent_depth.generation.config import EngineOptions
from recurrent_depth.generation.engine import Decoder
from recurrent_depth.generation.forcing import ThinkingBudget
from recurrent_depth.hf.engine import decoding
from recurrent_depth.hf.modeling import RecurrentDepthForCausalLM
from recurrent_depth.serving.config import Limits

MOST_STEPS = 64
"""Largest num_steps of a request if limits.num_steps is not given."""

_log = logging.getLogger(__name__)


class EngineStopped(RuntimeError):
    """The engine was closed or has failed before the last token of a request."""


@dataclass(frozen=True)
class Generation:
    """The options of one request to an engine.

    Args:
        prompt: ids to continue; at least one.
        max_new_tokens: most new tokens; a stop id of the engine ends the request earlier.
        num_steps: core iterations per token.
        temperature, top_k, top_p: options of sampling; temperature 0 takes the most probable token.
        seed: seed of sampling; None draws one.
        thinking: limits of a thinking part; None: no limits.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    num_steps: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    thinking: ThinkingBudget | None = None


class Tokens(Protocol):
    """The tokens of a request as they are generated."""

    def __aiter__(self) -> AsyncIterator[int]: ...

    async def __anext__(self) -> int: ...

    def cancel(self) -> None:
        """End the request within one token."""


class Engine(Protocol):
    """Generate the tokens of requests.

    Attributes:
        stop_ids: tokens that end a request; they are returned too.
        context: most tokens of prompt and answer together.
        vocab_size: ids must be below it.
        default_num_steps: core iterations of a request without num_steps.
        max_num_steps: largest num_steps that the engine can run, if limits.num_steps is not given.
    """

    stop_ids: frozenset[int]
    context: int
    vocab_size: int
    default_num_steps: int
    max_num_steps: int

    def submit(self, generation: Generation) -> Tokens:
        """Start a request. Must be called in a running event loop."""

    def cache_tokens(self, num_steps: int) -> int:
        """Return the number of tokens (prompt and answer) whose keys and values fit in memory at a depth."""

    def load(self) -> tuple[int, int]:
        """Return the numbers of requests that are being decoded and that are waiting."""

    def healthy(self) -> bool:
        """Return whether requests are being processed."""

    def close(self, seconds: float) -> bool:
        """End all requests with an `EngineStopped` and refuse new ones. Return False if that takes over `seconds`."""


class TokenQueue:
    """The tokens of one request: the engine adds them, possibly in another thread, and the event loop reads them.

    Must be made in a running event loop.
    """

    def __init__(self, generation: Generation, stop_ids: frozenset[int]) -> None:
        self.generation, self.stop_ids = generation, stop_ids
        self.cancelled = self.done = False
        self.count = 0
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[int | Exception] = asyncio.Queue()

    def __aiter__(self) -> "TokenQueue":
        return self

    async def __anext__(self) -> int:
        item = await self.queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> None:
        self.cancelled = True

    def take(self, token: int) -> bool:
        """Add a token. Return True if it was the last one."""
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
        except RuntimeError:  # the event loop has ended, so there is no reader
            self.cancelled = True


class DecoderEngine:
    """Decode requests in batches, in a thread.

    Waiting requests form a batch if they have equal sampling options and fit the context and the cache together. A
    batch is decoded to its end before the next one starts.

    Args:
        stop_ids: tokens that end a request.
        options: exit, cache budget, and the default of num_steps.
    """

    def __init__(
        self, model: RecurrentDepthForCausalLM, stop_ids: frozenset[int], limits: Limits, options: EngineOptions
    ) -> None:
        config = model.config
        self.stop_ids, self.context, self.vocab_size = stop_ids, config.block_size, config.vocab_size
        self.default_num_steps = options.num_steps or config.num_steps or config.mean_recurrence
        self.max_num_steps = max(MOST_STEPS, self.default_num_steps)
        self.limits, self.options = limits, decoding(options, gate=model.transformer.gate)
        self.decoder = Decoder(model)
        self.waiting: deque[TokenQueue] = deque()
        self.batch: list[TokenQueue] = []
        self.closed = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="decoding", daemon=True)
        self.thread.start()

    def submit(self, generation: Generation) -> Tokens:
        request = TokenQueue(generation, self.stop_ids)
        with self.changed:
            if self.closed:
                raise EngineStopped("the server is shutting down")
            self.waiting.append(request)
            self.changed.notify()
        return request

    def cache_tokens(self, num_steps: int) -> int:
        return int(self.limits.cache_gib * 2**30 / self._token_bytes(num_steps))

    def _token_bytes(self, num_steps: int) -> int:
        config, dtype = self.decoder.model.model_config, self.decoder.model.lm_head.weight.dtype
        return cache_bytes(config, 1, 1, num_steps, self.options.cache_budget, dtype=dtype)

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
        self._end(requests, EngineStopped("the server is shutting down"))  # the running pass may end much later
        self.thread.join(timeout=seconds)
        return not self.thread.is_alive()

    def _work(self) -> None:
        while batch := self._next_batch():
            try:
                self._decode(batch)
            except Exception as error:  # the server continues after a failed batch
                _log.exception("decoding a batch of %d requests failed", len(batch))
                self._end(batch, EngineStopped(f"decoding failed ({type(error).__name__}); see the server's log"))

    def _next_batch(self) -> list[TokenQueue]:
        """Wait for requests; return the first one and those that fit in its batch, or [] after `close`."""
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

    def _fits(self, batch: list[TokenQueue]) -> bool:
        first, asked = batch[0].generation, [request.generation for request in batch]
        sampling = (first.temperature, first.top_k, first.top_p)
        length = max(len(g.prompt) for g in asked) + max(g.max_new_tokens for g in asked)
        rows = self.cache_tokens(max(g.num_steps for g in asked)) // length
        equal = all((g.temperature, g.top_k, g.top_p) == sampling for g in asked)
        return len(batch) == 1 or (equal and length <= self.context and len(batch) <= rows)

    def _decode(self, batch: list[TokenQueue]) -> None:
        asked = [request.generation for request in batch]
        options = replace(
            self.options,
            max_new_tokens=max(g.max_new_tokens for g in asked),
            num_steps=[g.num_steps for g in asked],
            temperature=asked[0].temperature,
            top_k=asked[0].top_k,
            top_p=asked[0].top_p,
            stop=tuple(self.stop_ids),
            thinking=[g.thinking for g in asked],
        )
        seeds = [_row_name(g.seed) for g in asked]

        def on_token(row: int, token: int) -> bool:
            return batch[row].take(token) or self.closed

        self.decoder.generate([g.prompt for g in asked], options, requests=seeds, on_token=on_token)
        self._end(batch, StopAsyncIteration())

    @staticmethod
    def _end(requests: Iterable[TokenQueue], reason: Exception) -> None:
        for request in requests:
            request.end(reason)


def _row_name(seed: int | None) -> int:
    """Return the number (32 bits) that the draws of a request are a function of."""
    return random.getrandbits(32) if seed is None else (seed ^ (seed >> 32)) & 0xFFFFFFFF
