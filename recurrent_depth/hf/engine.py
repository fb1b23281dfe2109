"""The decoding engine behind transformers' `generate()`, lm-eval and the command line.

    model.generate(**inputs, custom_generate=Engine(EngineOptions(exit="kl")), use_cache=False, max_new_tokens=64)

Shapes: B requests, T tokens of the longest prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from recurrent_depth.generation.decoding import Decoded, Decoding, OnToken
from recurrent_depth.generation.exits import exit_rule
from recurrent_depth.generation.forcing import ThinkingBudget
from recurrent_depth.generation.graph import Captured
from recurrent_depth.generation.modes import Mode, decode_in_mode
from recurrent_depth.generation.scheduler import Refill
from recurrent_depth.generation.speculative import Speculation
from recurrent_depth.generation.stopping import StopStrings, cut
from recurrent_depth.generation.wavefront import Wavefront
from recurrent_depth.hf.forcing import Thinking
from recurrent_depth.hf.loading import unwrap


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How to decode, in numbers and texts. At most one of draft_steps, wavefront_steps, slots and captured
    chooses a mode.

    Args:
        num_steps: steps of the core for a token, at most; null takes the model's.
        min_steps: steps of the core for a token, at least.
        exit: when a token has thought enough: state-change, kl, entropy, argmax, or your own as package.module:Rule;
            null takes num_steps always.
        exit_threshold: of the rule (steps in a row for argmax); null takes the published value.
        prefix_monotone: tokens of a prompt leave in order; false repeats a known failure.
        warm_start: start a token's state from its predecessor's.
        cache_budget: recurrences the cache keeps; null keeps all.
        draft_steps: draft tokens with so few steps and verify them with num_steps; the text is the same.
        draft_tokens: tokens drafted a round.
        wavefront_steps: let the positions of a request think at the same time, so many steps a pass.
        wavefront_width: positions in flight, at most.
        wavefront_exact: write what plain decoding writes; false freezes positions and shares states, and is faster.
        wavefront_threshold: freeze a position whose state a pass changes by less.
        wavefront_average: weight of the earlier embedding in the moving average a position reads.
        slots: keep so many requests in the batch, and refill it at once when a token or a request is done.
        captured: replay the steps as CUDA graphs, so that launching them costs no time; on a CPU they run one by one.
        seed: of sampling.
        think: open a thinking part and keep the budget below.
        think_begin, think_end: its delimiters, one token each.
        think_at_most, think_at_least: its tokens.
        waits: ends of thinking that are replaced by `wait`.
        wait: text written instead of the end.
    """

    num_steps: int | None = None
    min_steps: int = 1
    exit: str | None = None
    exit_threshold: float | None = None
    prefix_monotone: bool = True
    warm_start: bool = False
    cache_budget: int | None = None
    draft_steps: int | None = None
    draft_tokens: int = 4
    wavefront_steps: int | None = None
    wavefront_width: int = 128
    wavefront_exact: bool = True
    wavefront_threshold: float = 0.03
    wavefront_average: float = 0.1
    slots: int | None = None
    captured: bool = False
    seed: int = 0
    think: bool = False
    think_begin: str = "<|begin_think|>"
    think_end: str = "<|end_think|>"
    think_at_most: int = 256
    think_at_least: int = 0
    waits: int = 0
    wait: str = "Wait"

    def mode(self) -> Mode | None:
        """The mode these options choose; None decodes plainly."""
        modes: dict[str, Mode] = {}
        if self.draft_steps is not None:
            modes["draft_steps"] = Speculation(self.draft_steps, self.draft_tokens)
        if self.wavefront_steps is not None:
            modes["wavefront_steps"] = Wavefront(
                self.wavefront_steps, self.wavefront_width, self.wavefront_exact, self.wavefront_threshold,
                self.wavefront_average,
            )  # fmt: skip
        if self.slots is not None:
            modes["slots"] = Refill(self.slots)
        if self.captured:
            modes["captured"] = Captured()
        if len(modes) > 1:
            raise ValueError(f"{' and '.join(modes)} each choose a way to decode; give one of them")
        return next(iter(modes.values()), None)

    def thinking(self) -> Thinking | None:
        if not self.think:
            return None
        return Thinking(
            self.think_begin, self.think_end, self.wait, self.think_at_most, self.think_at_least, self.waits
        )

    def decoding(self, tokenizer: Any = None, **changes: Any) -> Decoding:
        """Options for ids; `changes` are further fields of `Decoding` (max_new_tokens, temperature, stop, ...)."""
        thinking = self.thinking()
        if thinking is not None and tokenizer is None:
            raise ValueError("a thinking budget in texts needs a tokenizer; pass tokenizer=")
        fields = {
            "num_steps": self.num_steps,
            "min_steps": self.min_steps,
            "exit": None if self.exit is None else exit_rule(self.exit, self.exit_threshold),
            "prefix_monotone": self.prefix_monotone,
            "warm_start": self.warm_start,
            "cache_budget": self.cache_budget,
            "seed": self.seed,
            "thinking": None if thinking is None else thinking.budget(tokenizer),
        }
        return Decoding(**(fields | changes))


class Engine:
    """A `custom_generate` for transformers: the engine's modes, with `generate`'s prompts, sampling and stopping.

    Afterwards `result` holds what the last call took (steps, FLOPs, cache bytes). `generate` need not make a cache of
    its own: pass use_cache=False. Not honoured, and refused: beams, several sequences, logits processors. Stream with
    `on_token`, called with (request, token): transformers does not hand a streamer on to a custom_generate.
    """

    def __init__(
        self, options: EngineOptions = EngineOptions(), tokenizer: Any = None, on_token: OnToken | None = None
    ) -> None:
        self.options, self.tokenizer, self.on_token = options, tokenizer, on_token
        self.result: Decoded | None = None

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        """Continue input_ids [B, T], padded on the left; returns them with the new tokens, padded on the right."""
        _refuse(generation_config, logits_processor, model_kwargs.get("state_seed"))
        sampling = {}
        if generation_config.do_sample:
            sampling = {"temperature": generation_config.temperature or 1.0, "top_k": generation_config.top_k or None,
                        "top_p": generation_config.top_p or 1.0}  # fmt: skip
        eos = generation_config.eos_token_id
        stop = () if eos is None else tuple(eos) if isinstance(eos, Sequence) else (int(eos),)
        steps = model_kwargs.get("num_steps")
        changes = {} if steps is None else {"num_steps": steps}
        options = self.options.decoding(
            self.tokenizer,
            max_new_tokens=generation_config.max_length - input_ids.shape[1],
            stop=stop,
            **sampling,
            **changes,
        )
        on_token = _Listening(input_ids, stopping_criteria, self.on_token)
        prompts = unpadded(input_ids, model_kwargs.get("attention_mask"))
        self.result = decode_in_mode(unwrap(model), prompts, options, self.options.mode(), on_token=on_token)
        pad = generation_config.pad_token_id
        return joined(input_ids, self.result.tokens, 0 if pad is None else int(pad))


class _Listening:
    """transformers' stopping criteria, asked token by token."""

    def __init__(self, input_ids: Tensor, criteria: Any, then: OnToken | None) -> None:
        self.ids = [ids[None] for ids in input_ids]
        self.criteria, self.then = criteria, then

    def __call__(self, request: int, token: int) -> bool:
        new = torch.tensor([[token]], device=self.ids[request].device)
        self.ids[request] = torch.cat([self.ids[request], new], dim=1)
        ends = bool(self.criteria(self.ids[request], None).all())
        return (self.then is not None and bool(self.then(request, token))) or ends


def _refuse(config: Any, processors: Any, state_seed: int | None) -> None:
    if (config.num_beams or 1) > 1 or (config.num_return_sequences or 1) > 1:
        raise ValueError("the engine decodes one sequence a prompt; use num_beams=1 and num_return_sequences=1")
    known = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
    others = [type(processor).__name__ for processor in processors if not isinstance(processor, known)]
    if others:
        raise ValueError(f"the engine does not apply {', '.join(others)}; leave the option out or decode without it")
    if state_seed is not None:
        raise ValueError("the engine starts from zeros; leave state_seed out")


def unpadded(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """Prompts of a batch [B, T] without their padding."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return [ids[kept.bool()].tolist() for ids, kept in zip(input_ids, mask, strict=True)]


def joined(input_ids: Tensor, tokens: list[list[int]], pad: int) -> Tensor:
    """Prompts [B, T] and what was written behind them, padded on the right."""
    longest = max(map(len, tokens))
    new = torch.tensor([[*written, *[pad] * (longest - len(written))] for written in tokens], device=input_ids.device)
    return torch.cat([input_ids, new], dim=1)


def decode_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    options: Decoding,
    mode: Mode | None,
    stops: Sequence[str],
    on_token: OnToken | None = None,
) -> Decoded:
    """Decode until one of the texts `stops` appears (behind the thinking part, where there is a budget for one)."""
    strings = StopStrings(tokenizer.decode, stops, _end_of_thinking(options), on_token)
    return decode_in_mode(unwrap(model), prompts, options, mode, on_token=strings)


def text_of(tokenizer: Any, tokens: list[int], options: Decoding, stops: Sequence[str]) -> str:
    """What a request wrote, without special tokens, up to the first of the texts `stops`."""
    after = _end_of_thinking(options)
    begin = 0 if after is None else tokens.index(after) + 1 if after in tokens else len(tokens)
    thoughts, answer = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (tokens[:begin], tokens[begin:]))
    return thoughts + cut(answer, stops)


def _end_of_thinking(options: Decoding) -> int | None:
    return options.thinking.end[-1] if isinstance(options.thinking, ThinkingBudget) else None
