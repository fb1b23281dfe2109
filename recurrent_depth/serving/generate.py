"""`recurrent-depth generate`: text from prompts, with adaptive depth, shared caches and budgets of thinking."""

import json
import sys
from dataclasses import dataclass, field
from typing import Any

from recurrent_depth.generation.decoding import OnToken
from recurrent_depth.generation.stopping import TextStream
from recurrent_depth.hf.engine import EngineOptions, decode_texts, text_of
from recurrent_depth.hf.loading import load_model
from recurrent_depth.model.config import Kernels


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(EngineOptions):
    """Continue prompts; prints one JSON object a prompt, and what it took at the end.

    Args:
        model: run folder, export or hub name.
        prompts: texts; none reads standard input, one prompt a line.
        max_new_tokens: tokens written after each prompt, at most.
        temperature: 0 takes the likeliest token.
        top_k, top_p: limits of sampling.
        stop: texts that end a request.
        chat: write prompts as chat.
        stream: write the text of a single prompt to standard error as it comes.
        device: cpu or cuda.
        kernels: who computes the element-wise operations: auto, triton, torch.
    """

    model: str
    prompts: list[str] = field(default_factory=list)
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    stop: list[str] = field(default_factory=list)
    chat: bool = False
    stream: bool = False
    device: str = "cpu"
    kernels: Kernels = "auto"


def generate(config: GenerateConfig) -> None:
    """Decode all prompts."""
    model, tokenizer = load_model(config.model, device=config.device, kernels=config.kernels)
    if tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer; decode ids with recurrent_depth.generation.decoding")
    prompts = config.prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if config.stream and len(prompts) > 1:
        raise ValueError(f"stream follows one prompt, there are {len(prompts)}; leave it out")
    ids = [_encode(tokenizer, prompt, config.chat) for prompt in prompts]
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end_turn|>")} - {None}
    options = config.decoding(
        tokenizer, max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_k=config.top_k,
        top_p=config.top_p, stop=tuple(sorted(ends)),
    )  # fmt: skip
    on_token = _printing(tokenizer) if config.stream else None
    result = decode_texts(model, tokenizer, ids, options, config.mode(), config.stop, on_token)
    for prompt, tokens, steps in zip(prompts, result.tokens, result.steps, strict=True):
        text = text_of(tokenizer, tokens, options, config.stop)
        print(json.dumps({"prompt": prompt, "text": text, "steps": steps}, ensure_ascii=False))
    print(
        f"{sum(map(len, result.tokens))} tokens, {result.core_steps} core steps, {result.flops:.3g} FLOPs, "
        f"{result.cache_bytes / 2**20:.1f} MiB of cache",
        file=sys.stderr,
    )


def _printing(tokenizer: Any) -> OnToken:
    """Writes text to standard error as its tokens come."""
    text = TextStream(tokenizer.decode)

    def write(request: int, token: int) -> None:
        print(text.push(token), end="", file=sys.stderr, flush=True)

    return write


def _encode(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
