"""`recurrent-depth generate`: text from prompts, with adaptive depth, shared caches and budgets of thinking."""

import json
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from recurrent_depth.generation.decoding import Decoding, decode
from recurrent_depth.generation.exits import exit_rule
from recurrent_depth.generation.forcing import ThinkingBudget
from recurrent_depth.generation.speculative import Speculation, decode_speculatively
from recurrent_depth.hf.loading import load_model, unwrap
from recurrent_depth.model.ops import Kernels


@dataclass(frozen=True)
class GenerateConfig:
    """Continue prompts; prints one JSON object a prompt, and what it took at the end.

    Args:
        model: run folder, export or hub name.
        prompts: texts; none reads standard input, one prompt a line.
        max_new_tokens: tokens written after each prompt, at most.
        num_steps: steps of the core, at most; null takes the model's.
        min_steps: steps of the core, at least.
        exit: when a token has thought enough: state-change, kl, entropy, argmax; null takes num_steps always.
        exit_threshold: of the rule (steps in a row for argmax); null takes the published value.
        prefix_monotone: tokens of a prompt leave in order; false repeats a known failure.
        warm_start: start a token's state from its predecessor's.
        draft_steps: draft tokens with so few steps and verify them with num_steps; the text is the same. Null: no.
        draft_tokens: tokens drafted a round.
        temperature: 0 takes the likeliest token.
        top_k, top_p: limits of sampling.
        seed: of sampling.
        stop: texts that end a request.
        cache_budget: recurrences the cache keeps; null keeps all.
        think: open a thinking part and keep the budget below.
        think_begin, think_end: its delimiters.
        think_at_most, think_at_least: its tokens.
        waits: ends of thinking that are replaced by `wait`.
        wait: text written instead of the end.
        chat: write prompts as chat.
        device: cpu or cuda.
        kernels: who computes the element-wise operations: auto, triton, torch.
    """

    model: str
    prompts: list[str] = field(default_factory=list)
    max_new_tokens: int = 64
    num_steps: int | None = None
    min_steps: int = 1
    exit: Literal["state-change", "kl", "entropy", "argmax"] | None = None
    exit_threshold: float | None = None
    prefix_monotone: bool = True
    warm_start: bool = False
    draft_steps: int | None = None
    draft_tokens: int = 4
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    stop: list[str] = field(default_factory=list)
    cache_budget: int | None = None
    think: bool = False
    think_begin: str = "<|begin_think|>"
    think_end: str = "<|end_think|>"
    think_at_most: int = 256
    think_at_least: int = 0
    waits: int = 0
    wait: str = "Wait"
    chat: bool = False
    device: str = "cpu"
    kernels: Kernels = "auto"


def generate(config: GenerateConfig) -> None:
    """Decode all prompts in one batch."""
    model, tokenizer = load_model(config.model, device=config.device, kernels=config.kernels)
    if tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer; decode ids with recurrent_depth.generation.decoding")
    prompts = config.prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    ids = [_encode(tokenizer, prompt, config.chat) for prompt in prompts]
    written: list[list[int]] = [[] for _ in ids]

    def ends(row: int, token: int) -> bool:
        written[row].append(token)
        return any(text in tokenizer.decode(written[row]) for text in config.stop)

    options, on_token = _decoding(config, tokenizer), ends if config.stop else None
    if config.draft_steps is None:
        result = decode(unwrap(model), ids, options, on_token=on_token)
    else:
        speculation = Speculation(config.draft_steps, config.draft_tokens)
        result = decode_speculatively(unwrap(model), ids, options, speculation, on_token=on_token)
    for prompt, tokens, steps in zip(prompts, result.tokens, result.steps, strict=True):
        text = _cut(tokenizer.decode(tokens, skip_special_tokens=True), config.stop)
        print(json.dumps({"prompt": prompt, "text": text, "steps": steps}, ensure_ascii=False))
    print(
        f"{sum(map(len, result.tokens))} tokens, {result.core_steps} core steps, {result.flops:.3g} FLOPs, "
        f"{result.cache_bytes / 2**20:.1f} MiB of cache",
        file=sys.stderr,
    )


def _encode(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def _decoding(config: GenerateConfig, tokenizer: Any) -> Decoding:
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end_turn|>")} - {None}
    return Decoding(
        max_new_tokens=config.max_new_tokens,
        num_steps=config.num_steps,
        min_steps=config.min_steps,
        exit=None if config.exit is None else exit_rule(config.exit, config.exit_threshold),
        prefix_monotone=config.prefix_monotone,
        warm_start=config.warm_start,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        stop=tuple(sorted(ends)),
        cache_budget=config.cache_budget,
        thinking=_thinking(config, tokenizer) if config.think else None,
    )


def _thinking(config: GenerateConfig, tokenizer: Any) -> ThinkingBudget:
    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    for name in ("think_begin", "think_end"):
        text = getattr(config, name)
        if len(ids(text)) != 1:
            raise ValueError(
                f"{name} {text!r} is {len(ids(text))} tokens of this tokenizer; a delimiter must be one token. "
                "The spares <|c_0|>, <|c_1|>, ... are"
            )
    return ThinkingBudget(
        ids(config.think_begin), ids(config.think_end), ids(config.wait), config.think_at_most, config.think_at_least,
        config.waits,
    )  # fmt: skip


def _cut(text: str, stops: list[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]
