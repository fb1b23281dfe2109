"""A model behind an OpenAI-compatible server: concurrent requests, replies kept as they come, tokens counted."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from recurrent_depth.checks import check_at_least, check_fraction, check_not_empty, check_positive
from recurrent_depth.data.layout import DataError
from recurrent_depth.extras import require
from recurrent_depth.files import json_hash
from recurrent_depth.reasoning.curation.replies import Reply, ReplyCache
from recurrent_depth.terminal import progress


@dataclass(frozen=True)
class EndpointConfig:
    """A chat model behind a server.

    Args:
        url: address of the server, for example http://localhost:8000/v1.
        model: name of the model on the server.
        api_key_env: environment variable that holds the key; a local server needs none.
        system: system message; null for none.
        max_tokens: tokens of the longest reply, its reasoning included; null sends no limit (some models want another
            name, see extra).
        temperature: of sampling; null sends none.
        seed: of sampling; null sends none.
        extra: further fields of the request, for example {reasoning_effort: high}.
        concurrency: requests sent at the same time.
        timeout_s: seconds to wait for a reply.
        retries: attempts after a temporary failure (connection, 408, 409, 429, 5xx), with growing pauses.
        give_up_after: consecutive failures after which no more requests are sent.
        allowed_failures: share of requests that may fail; their rows are dropped and counted. More is an error, and the
            next run asks for the missing ones alone.
    """

    url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    system: str | None = None
    max_tokens: int | None = 4096
    temperature: float | None = 0.0
    seed: int | None = 0
    extra: dict[str, Any] = field(default_factory=dict)
    concurrency: int = 8
    timeout_s: float = 600.0
    retries: int = 4
    give_up_after: int = 16
    allowed_failures: float = 0.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url is {self.url!r}; it must begin with http:// or https://")
        check_not_empty("model", self.model, "model: gpt-4o-mini")
        for name in ("max_tokens", "concurrency", "give_up_after"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("temperature", self.temperature, 0)
        check_positive("timeout_s", self.timeout_s)
        check_at_least("retries", self.retries, 0)
        check_fraction("allowed_failures", self.allowed_failures)

    def fingerprint(self) -> Any:
        """Return what decides the replies: the model's name and the request, not the address or the concurrency."""
        return {name: value for name, value in asdict(self).items() if name in _DECIDING}

    def check(self) -> None:
        """Raise if a package is missing."""
        require("openai", "recurrent-depth[curate]", "a model behind a server")

    def open(self) -> "EndpointWriter":
        """Return the client."""
        return EndpointWriter(self)


_DECIDING = ("model", "system", "max_tokens", "temperature", "seed", "extra")


class EndpointWriter:
    """Sends prompts to a server, `concurrency` at a time."""

    def __init__(self, config: EndpointConfig) -> None:
        from openai import OpenAI

        self.config = config
        self.client = OpenAI(
            base_url=config.url,
            api_key=os.environ.get(config.api_key_env, "none"),
            timeout=config.timeout_s,
            max_retries=config.retries,
        )
        self.consecutive_failures = 0

    def write(self, prompts: Sequence[str], cache: ReplyCache) -> list[Reply]:
        """Return one reply per prompt. Requests that failed carry their error, if `allowed_failures` permits it."""
        keys = [json_hash([self.config.fingerprint(), prompt]) for prompt in prompts]
        wanted = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if cache.get(key) is None}
        failed: dict[str, Reply] = {}

        def ask(key: str, prompt: str) -> None:
            reply = self._ask(prompt)
            if reply.error is None:
                cache.put({key: reply})
            else:
                failed[key] = reply

        threads = ThreadPoolExecutor(self.config.concurrency)
        try:
            with progress(self.config.model, len(wanted)) as advance:
                for _ in threads.map(ask, wanted.keys(), wanted.values()):
                    advance()
        finally:  # after Ctrl-C no request is sent, and open ones are not waited for
            threads.shutdown(wait=False, cancel_futures=True)
        self._check(failed, len(wanted))
        return [failed[key] if key in failed else cache.replies[key] for key in keys]

    def _check(self, failed: dict[str, Reply], asked: int) -> None:
        if len(failed) > self.config.allowed_failures * asked:
            first = next(iter(failed.values())).error
            raise DataError(
                f"{self.config.model}: {len(failed)} of {asked} requests failed, the first with: {first}. The other "
                "replies are kept; run the command again to repeat these requests, or raise allowed_failures"
            )

    def _ask(self, prompt: str) -> Reply:
        from openai import OpenAIError

        config = self.config
        if self.consecutive_failures >= config.give_up_after:
            return Reply("", error=f"not sent: {config.give_up_after} consecutive requests had failed")
        system = [] if config.system is None else [{"role": "system", "content": config.system}]
        messages: list[Any] = [*system, {"role": "user", "content": prompt}]
        sampling = {"max_tokens": config.max_tokens, "temperature": config.temperature, "seed": config.seed}
        given: dict[str, Any] = {name: value for name, value in sampling.items() if value is not None}
        try:
            completion = self.client.chat.completions.create(
                model=config.model, messages=messages, extra_body=config.extra, **given
            )
            reply = _reply(completion)
        except (
            OpenAIError,
            AttributeError,
            IndexError,
            TypeError,
            ValueError,
        ) as error:  # failed, or not a completion
            self.consecutive_failures += 1
            return Reply("", error=f"{type(error).__name__}: {error}"[:300])
        self.consecutive_failures = 0
        return reply


def _reply(completion: Any) -> Reply:
    choice, usage = completion.choices[0], completion.usage
    message = choice.message
    reasoning = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None) or ""
    return Reply(
        text=message.content or "",
        reasoning=reasoning,
        finish=choice.finish_reason or "stop",
        tokens_in=usage.prompt_tokens if usage else 0,
        tokens_out=usage.completion_tokens if usage else 0,
    )
