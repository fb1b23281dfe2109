"""The requests, answers and errors of the OpenAI protocol, with the additional field `num_steps`.

No field is ignored: an unknown field, or a value that is not implemented, is an error.
"""

import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "echo": (None, False),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "store": (None, False),
}
"""Fields of OpenAI's protocol that this server does not implement, with the values that are accepted (no effect)."""

_ABOUT_THE_CALLER = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier")
_SEED = 2**63


class ApiError(Exception):
    """An error sent to a client, with an HTTP status and OpenAI's error object."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    include_usage: bool = False


class GenerationRequest(BaseModel):
    """The common fields of chat completions and completions."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str = Field(description="Name of the served model, as GET /v1/models gives it.")
    max_tokens: int | None = Field(None, ge=1, description="Most new tokens; default: as context and limits allow.")
    num_steps: int | None = Field(None, ge=1, description="Core iterations per token; default: the model's.")
    reasoning_effort: Literal["low", "medium", "high"] | None = Field(
        None, description="Core iterations and thinking tokens by the model's table; num_steps, if given, has priority."
    )
    temperature: float = Field(1.0, ge=0, le=2, description="0 takes the most probable token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample among the top tokens with this total probability.")
    top_k: int | None = Field(None, ge=1, description="Sample among this many tokens.")
    seed: int | None = Field(None, ge=-_SEED, lt=_SEED, description="Equal seeds give equal texts for equal requests.")
    stop: str | list[str] | None = Field(None, description="Texts that end the answer; they are not returned.")
    stream: bool = False
    stream_options: StreamOptions | None = None

    def stop_texts(self) -> tuple[str, ...]:
        texts = [self.stop] if isinstance(self.stop, str) else (self.stop or [])
        if not all(texts) or len(texts) > 16 or max(map(len, texts), default=0) > 256:
            raise ApiError(400, "stop must be at most 16 texts of 1 to 256 characters", param="stop")
        return tuple(texts)

    def check_fields(self) -> None:
        """Raise an ApiError for a field that is unknown, or has a value that is not implemented."""
        for name, value in (self.model_extra or {}).items():
            if name in _ABOUT_THE_CALLER or (name in _NEUTRAL and value in _NEUTRAL[name]):
                continue
            if name in _NEUTRAL:
                raise ApiError(400, f"{name} is {value!r}; this server does not implement it, leave it out", param=name)
            known = sorted({*type(self).model_fields, *_NEUTRAL, *_ABOUT_THE_CALLER})
            raise ApiError(400, f"unknown field {name!r}; known are {', '.join(known)}", param=name)


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def for_template(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="Another name of max_tokens.")

    def new_tokens(self) -> int | None:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens differ; give one", param="max_tokens")
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(GenerationRequest):
    prompt: str | list[int] | list[str] | list[list[int]] = Field(description="One prompt, as text or token ids.")

    def new_tokens(self) -> int | None:
        return self.max_tokens

    def single_prompt(self) -> str | list[int]:
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise ApiError(400, f"prompt holds {len(prompt)} prompts; send a request for each", param="prompt")
            prompt = prompt[0]
        return prompt


class Reply:
    """Build the objects of one answer, whole or in chunks. `kind` is chat.completion or text_completion."""

    def __init__(self, kind: Literal["chat.completion", "text_completion"], model: str) -> None:
        self.chat = kind == "chat.completion"
        prefix = "chatcmpl" if self.chat else "cmpl"
        self.common = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.kind = kind

    def whole(self, text: str, finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
        return {**self.common, "object": self.kind, "choices": [choice], "usage": usage}

    def chunk(self, text: str | None, finish_reason: str | None = None, first: bool = False) -> dict[str, Any]:
        if self.chat:
            delta = {"role": "assistant"} if first else {}
            content: dict[str, Any] = {"delta": delta if text is None else {**delta, "content": text}}
        else:
            content = {"text": text or ""}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
        return {**self.common, "object": self._chunk_kind, "choices": [choice]}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        return {**self.common, "object": self._chunk_kind, "choices": [], "usage": usage}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return OpenAI's usage object."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
