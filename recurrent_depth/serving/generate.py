"""`recurrent-depth generate`: continue prompts in any mode, with exit rules, cache budgets and thinking limits."""

import json
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from recurrent_depth.checks import check_at_least, check_between
from recurrent_depth.generation.config import EngineOptions
from recurrent_depth.model.config import Kernels

if TYPE_CHECKING:
    from recurrent_depth.generation.request import OnToken


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(EngineOptions):
    """Continue prompts; print one JSON object per prompt, then tokens, core iterations, FLOPs and cache size.

    Args:
        model: run folder, checkpoint, export, Hugging Face folder or hub name.
        prompt: text to continue, taken literally; give the option once for each prompt. Without it, every line of
            standard input is a prompt.
        max_new_tokens: largest number of tokens written after each prompt.
        temperature: sampling temperature; 0 takes the most probable token.
        top_k: sample among this many tokens; null: all.
        top_p: sample among the most probable tokens with this total probability.
        stop: text that ends a request; give the option once for each text.
        chat: format each prompt as the message of a user.
        stream: write the text of a single prompt to standard error as it is generated.
        device: auto, cpu, cuda or cuda:N.
        dtype: dtype of the weights; auto is bfloat16 on a GPU and float32 on a CPU.
        kernels: implementation of the element-wise operations; auto is triton on a GPU.
        quantize: int8 keeps the weights of linear layers as 8-bit integers (needs torchao); null keeps `dtype`.
    """

    model: str
    prompt: list[str] = field(default_factory=list, metadata={"literal": True})
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    stop: list[str] = field(default_factory=list, metadata={"literal": True})
    chat: bool = False
    stream: bool = False
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    kernels: Kernels = "auto"
    quantize: Literal["int8"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("max_new_tokens", self.max_new_tokens, 1)
        check_at_least("temperature", self.temperature, 0)
        check_at_least("top_k", self.top_k, 1)
        check_between("top_p", self.top_p, 0, 1, low_open=True)
        if not all(self.stop):
            raise ValueError("stop is an empty text; leave it out")
        if self.stream and self.best_of is not None:
            raise ValueError("stream writes one answer as it comes, best_of chooses among several; leave one out")
        self.check_stream(self.prompt)

    def check_stream(self, prompts: list[str]) -> None:
        """Raise if `stream` is set and there are several prompts."""
        if self.stream and len(prompts) > 1:
            raise ValueError(f"stream needs one prompt, but {len(prompts)} were given; leave stream out")


def generate(config: GenerateConfig) -> None:
    """Continue all prompts and print the results."""
    from recurrent_depth.depth_range import warn_beyond
    from recurrent_depth.devices import choose_device, choose_dtype
    from recurrent_depth.generation.engine import Decoder
    from recurrent_depth.generation.exits import GATE, exit_rule
    from recurrent_depth.hf.engine import decoding, run, stop_at, text_of
    from recurrent_depth.hf.loading import load_model

    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    if config.exit not in (None, GATE):
        exit_rule(config.exit, config.exit_threshold)  # refuse an unknown rule before the model is loaded
    model, tokenizer = load_model(config.model, dtype, device, config.kernels, config.quantize)
    if tokenizer is None:
        raise ValueError(f"model: {config.model} has no tokenizer; generate from ids with recurrent_depth.generation")
    warn_beyond(config.model, config.num_steps or model.config.num_steps)
    prompts = config.prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise ValueError("no prompt was given; use --prompt TEXT, or write one per line to standard input")
    config.check_stream(prompts)
    ids = [_encode(tokenizer, prompt, config.chat) for prompt in prompts]
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end_turn|>")} - {None}
    options = decoding(
        config, tokenizer, model.transformer.gate,
        max_new_tokens=config.max_new_tokens, num_steps=config.num_steps or model.config.num_steps,
        temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, stop=tuple(sorted(ends)),
    )  # fmt: skip
    on_token = stop_at(tokenizer, config.stop, options, _printing(tokenizer) if config.stream else None)
    result = run(Decoder(model, config.mode()), ids, options, config, tokenizer, config.stop, on_token)
    for prompt, tokens, steps in zip(prompts, result.tokens, result.steps, strict=True):
        text = text_of(tokenizer, tokens, options, config.stop)
        print(json.dumps({"prompt": prompt, "text": text, "steps": steps}, ensure_ascii=False))
    print(
        f"{sum(map(len, result.tokens))} tokens, {result.core_iterations} core iterations, {result.flops:.3g} FLOPs, "
        f"{result.cache_bytes / 2**20:.1f} MiB of cache",
        file=sys.stderr,
    )


def _printing(tokenizer: Any) -> "OnToken":
    """Return an `on_token` that writes text to standard error."""
    from recurrent_depth.generation.text import TextStream

    text = TextStream(tokenizer.decode)

    def write(request: int, token: int) -> None:
        print(text.push(token), end="", file=sys.stderr, flush=True)

    return write


def _encode(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
