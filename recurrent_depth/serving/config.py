"""Options of `recurrent-depth serve` and `recurrent-depth chat`. Imports neither torch nor transformers."""

from dataclasses import dataclass, field
from typing import Literal

from recurrent_depth.checks import check_at_least, check_between, check_num_steps, check_positive

KEY_VARIABLE = "RECURRENT_DEPTH_API_KEY"
"""Environment variable with the key of a server, read by serve and chat."""


@dataclass(frozen=True)
class Limits:
    """Limits of requests. A request beyond a limit gets a 4xx status and a message that names the limit.

    Args:
        num_steps: largest num_steps of a request (core iterations per token); null: 64, and with vLLM the model's
            default, because there the cache of every token has room for the largest number.
        new_tokens: most tokens of an answer; also the default of max_tokens, as far as the context allows.
        body_bytes: largest body of a request, in bytes; tokenizing a text takes far more memory than the text.
        requests: most requests in progress, decoding or waiting; further ones get status 429.
        batch: most requests decoded together.
        cache_gib: memory for the keys and values of the requests decoded together, in GiB.
        seconds: seconds from the arrival of a request to its last token, waiting included.
        body_seconds: seconds a client may take to send a body.
        shutdown_seconds: seconds that requests in progress have to finish after SIGTERM or Ctrl-C.
    """

    num_steps: int | None = None
    new_tokens: int = 2048
    body_bytes: int = 2**18
    requests: int = 64
    batch: int = 16
    cache_gib: float = 8.0
    seconds: float = 600.0
    body_seconds: float = 30.0
    shutdown_seconds: float = 5.0

    def __post_init__(self) -> None:
        for name in ("num_steps", "new_tokens", "body_bytes", "requests", "batch"):
            check_at_least(f"limits.{name}", getattr(self, name), 1)
        for name in ("cache_gib", "seconds", "body_seconds"):
            check_positive(f"limits.{name}", getattr(self, name))
        check_at_least("limits.shutdown_seconds", self.shutdown_seconds, 0)


@dataclass(frozen=True)
class ServeConfig:
    """Serve a model over the OpenAI protocol: chat completions, completions, models, health, metrics.

    A request sets its number of core iterations with `num_steps`; with the openai package
    `extra_body={"num_steps": 8}`. Only this model is served; requests cannot load another one.

    Args:
        model: run folder, checkpoint, export, Hugging Face folder or hub name.
        served_name: name of the model for clients; null takes the folder's name.
        host: address to listen on; 0.0.0.0 accepts other machines (set api_key then).
        port: port to listen on, 1 to 65535; 0 takes a free one and prints it.
        device: auto, cpu, cuda or cuda:N.
        dtype: dtype of the weights; auto is bfloat16 on a GPU and float32 on a CPU.
        kernels: implementation of the element-wise operations; auto is triton on a GPU; not with vLLM.
        quantize: int8 keeps the weights of linear layers as 8-bit integers (needs torchao); null keeps `dtype`; not
            with vLLM.
        engine: vllm, transformers (the decoder of this package), or auto: vllm where it is installed.
        default_num_steps: num_steps of a request that gives none; null takes the model's.
        cache_budget: iterations whose keys and values are kept; null keeps all.
        exit: rule that stops iterating a converged token: state-change; with the engine transformers also kl, entropy,
            argmax and gate. null always runs num_steps.
        exit_threshold: threshold of the rule; null takes the default of the rule.
        exit_prompt: let tokens of the prompt stop early too; false runs the prompt at num_steps.
        tensor_parallel: GPUs that share the weights; with vLLM only.
        api_key: key that clients must send (Authorization: Bearer KEY); null takes the environment variable
            RECURRENT_DEPTH_API_KEY; without it no key is required.
        limits: limits of requests.
    """

    model: str
    served_name: str | None = None
    host: str = "localhost"
    port: int = 8000
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    kernels: Literal["auto", "triton", "torch"] = "auto"
    quantize: Literal["int8"] | None = None
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    default_num_steps: int | None = None
    cache_budget: int | None = None
    exit: str | None = None
    exit_threshold: float | None = None
    exit_prompt: bool = False
    tensor_parallel: int = 1
    api_key: str | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        check_between("port", self.port, 0, 65535)
        check_num_steps("default_num_steps", self.default_num_steps)
        for name in ("cache_budget", "tensor_parallel"):
            check_at_least(name, getattr(self, name), 1)
        if self.exit_threshold is not None and self.exit is None:
            raise ValueError("exit_threshold is given without exit; name the rule, for example exit state-change")
        check_at_least("exit_threshold", self.exit_threshold, 0)
        for name in ("model", "host"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give a value")
        for name in ("served_name", "api_key"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} is empty; give a value, or leave the option out")


@dataclass(frozen=True)
class ChatConfig:
    """Talk to a model. An empty line or the end of the input ends the conversation; Ctrl-C ends an answer.

    Args:
        model: run folder, checkpoint, export, Hugging Face folder or hub name; with `url`, the name of the model on the
            server (null takes the served one).
        url: address of a running server, for example http://localhost:8000/v1; null starts one for this chat.
        api_key: key of that server; null takes the environment variable RECURRENT_DEPTH_API_KEY.
        num_steps: core iterations per token; null takes the model's default.
        max_new_tokens: longest answer, in tokens; null: 256, or half of the context if that is less.
        temperature: sampling temperature, at most 2; 0 takes the most probable token.
        system: system message; null for none.
        device: auto, cpu, cuda or cuda:N; not with `url`.
    """

    model: str | None = None
    url: str | None = None
    api_key: str | None = None
    num_steps: int | None = None
    max_new_tokens: int | None = None
    temperature: float = 0.0
    system: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.model and not self.url:
            raise ValueError("neither model nor url is given; give a model, or the url of a running server")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url is {self.url!r}; it must start with http:// or https://")
        check_at_least("num_steps", self.num_steps, 1)
        check_at_least("max_new_tokens", self.max_new_tokens, 1)
        check_between("temperature", self.temperature, 0, 2)
