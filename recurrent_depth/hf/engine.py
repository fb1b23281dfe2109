"""The decoding engine for transformers' `generate()`, lm-eval and the command line.

    model.generate(**inputs, custom_generate=Engine(EngineOptions(exit="kl")), use_cache=False, max_new_tokens=64)

Shapes: B requests, T tokens of the longest prompt.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from recurrent_depth.generation.best_of import decode_best_of
from recurrent_depth.generation.config import EngineOptions
from recurrent_depth.generation.engine import Decoder
from recurrent_depth.generation.exits import exit_rule
from recurrent_depth.generation.forcing import ThinkingBudget
from recurrent_depth.generation.request import Decoded, Decoding, OnToken
from recurrent_depth.generation.text import StopStrings, truncate_at
from recurrent_depth.hf.forcing import thinking_budget
from recurrent_depth.model.gate import Gate
from recurrent_depth.model.recurrence import split_steps


def decoding(options: EngineOptions, tokenizer: Any = None, gate: Gate | None = None, **changes: Any) -> Decoding:
    """Return the `Decoding` options for engine options.

    Args:
        tokenizer: converts the delimiters of thinking to ids; needed with `options.thinking`.
        gate: the exit gate of the model (model.transformer.gate); needed with the exit rule `gate`.
        changes: further fields of `Decoding` (max_new_tokens, temperature, stop, ...).
    """
    if options.thinking is not None and tokenizer is None:
        raise ValueError("thinking is given without a tokenizer for its delimiters; pass tokenizer=")
    fields = {
        "num_steps": options.num_steps,
        "min_steps": options.min_steps,
        "exit": None if options.exit is None else exit_rule(options.exit, options.exit_threshold, gate),
        "exit_prompt": options.exit_prompt,
        "prefix_monotone": options.prefix_monotone,
        "warm_start": options.warm_start,
        "cache_budget": options.cache_budget,
        "seed": options.seed,
        "thinking": None if options.thinking is None else thinking_budget(options.thinking, tokenizer),
    }
    return Decoding(**(fields | changes))


def run(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    options: Decoding,
    engine: EngineOptions,
    tokenizer: Any = None,
    stops: Sequence[str] = (),
    on_token: OnToken | None = None,
) -> Decoded:
    """Decode prompts, with `best_of` if the engine options have it.

    Args:
        tokenizer: converts answers to texts, which a vote compares; without it the tokens are compared.
        stops: texts that end an answer.
    """
    if engine.best_of is None:
        return decoder.generate(prompts, options, on_token=on_token)

    def answer(tokens: list[int]) -> Any:
        return tuple(tokens) if tokenizer is None else _texts(tokenizer, tokens, options, stops)[1].strip()

    return decode_best_of(decoder, prompts, options, engine.best_of, answer=answer, on_token=on_token)


class Engine:
    """A `custom_generate` for transformers: the modes of the engine, with prompts, sampling and stopping of `generate`.

    After a call `result` holds the `Decoded` (iterations, FLOPs, cache bytes). Pass use_cache=False, so that `generate`
    does not allocate a second cache. Beams, several sequences and logits processors are refused. For streaming use
    `on_token`, called with (request, token): transformers does not pass a streamer to a custom_generate.

    Reuse the object for many calls: as long as the model is the same, its `Decoder` keeps memory and captured graphs.
    """

    def __init__(
        self, options: EngineOptions | None = None, tokenizer: Any = None, on_token: OnToken | None = None
    ) -> None:
        self.options, self.tokenizer, self.on_token = options or EngineOptions(), tokenizer, on_token
        self.decoder: Decoder | None = None
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
        """Continue input_ids [B, T], padded on the left; return them with the new tokens, padded on the right."""
        _refuse(generation_config, logits_processor, model_kwargs.get("state_seed"))
        sampling = {}
        if generation_config.do_sample:
            sampling = {"temperature": generation_config.temperature or 1.0, "top_k": generation_config.top_k or None,
                        "top_p": generation_config.top_p or 1.0}  # fmt: skip
        eos = generation_config.eos_token_id
        stop = () if eos is None else tuple(eos) if isinstance(eos, Sequence) else (int(eos),)
        steps = model_kwargs.get("num_steps") or self.options.num_steps or model.config.num_steps
        options = decoding(
            self.options,
            self.tokenizer,
            model.transformer.gate,
            max_new_tokens=generation_config.max_length - input_ids.shape[1],
            num_steps=None if steps is None else sum(split_steps(steps)),
            stop=stop,
            **sampling,
        )
        if self.decoder is None or self.decoder.model is not model:
            self.decoder = Decoder(model, self.options.mode())
        samples = 1 if self.options.best_of is None else self.options.best_of.samples
        ids = input_ids.repeat_interleave(samples, dim=0)
        on_token = _StoppingCriteria(ids, stopping_criteria, self.on_token)
        prompts = unpadded(input_ids, model_kwargs.get("attention_mask"))
        self.result = run(self.decoder, prompts, options, self.options, self.tokenizer, on_token=on_token)
        pad = generation_config.pad_token_id
        return joined(input_ids, self.result.tokens, 0 if pad is None else int(pad))


class _StoppingCriteria:
    """Check the stopping criteria of transformers after every token."""

    def __init__(self, input_ids: Tensor, criteria: Any, then: OnToken | None) -> None:
        self.ids = [ids[None] for ids in input_ids]
        self.criteria, self.then = criteria, then

    def __call__(self, request: int, token: int) -> bool:
        new = torch.tensor([[token]], device=self.ids[request].device)
        self.ids[request] = torch.cat([self.ids[request], new], dim=1)
        ends = bool(self.criteria(self.ids[request], None).all())  # host: `generate` of transformers reads it too
        return (self.then is not None and bool(self.then(request, token))) or ends


def _refuse(config: Any, processors: Any, state_seed: int | None) -> None:
    if (config.num_beams or 1) > 1 or (config.num_return_sequences or 1) > 1:
        raise ValueError("the engine decodes one sequence per prompt; use num_beams=1 and num_return_sequences=1")
    known = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
    others = [type(processor).__name__ for processor in processors if not isinstance(processor, known)]
    if others:
        raise ValueError(f"the engine does not apply {', '.join(others)}; leave the option out or decode without it")
    if state_seed is not None:
        raise ValueError("the engine starts from a zero state; leave state_seed out")


def unpadded(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """Return the prompts of a batch [B, T] without their padding."""
    rows = input_ids.tolist()  # host: the decoder takes ids from there
    if attention_mask is None:
        return rows
    masks = attention_mask.tolist()  # host: as the ids
    return [[i for i, kept in zip(ids, mask, strict=True) if kept] for ids, mask in zip(rows, masks, strict=True)]


def joined(input_ids: Tensor, tokens: list[list[int]], pad: int) -> Tensor:
    """Return the prompts [B, T] followed by the written tokens, padded on the right."""
    longest = max(map(len, tokens))
    new = torch.tensor([[*written, *[pad] * (longest - len(written))] for written in tokens], device=input_ids.device)
    return torch.cat([input_ids, new], dim=1)


def stop_at(tokenizer: Any, stops: Sequence[str], options: Decoding, on_token: OnToken | None = None) -> StopStrings:
    """Return an `on_token` that ends requests at one of the texts `stops`, after the thinking part if there is one."""
    return StopStrings(tokenizer.decode, stops, _end_of_thinking(options), on_token)


def text_of(tokenizer: Any, tokens: list[int], options: Decoding, stops: Sequence[str]) -> str:
    """Return the text of a request without special tokens, up to the first of the texts `stops`."""
    return "".join(_texts(tokenizer, tokens, options, stops))


def _texts(tokenizer: Any, tokens: list[int], options: Decoding, stops: Sequence[str]) -> tuple[str, str]:
    """Return the thinking part and the answer, up to the first of the texts `stops`."""
    after = _end_of_thinking(options)
    begin = 0 if after is None else tokens.index(after) + 1 if after in tokens else len(tokens)
    thoughts, answer = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (tokens[:begin], tokens[begin:]))
    return thoughts, truncate_at(answer, stops)


def _end_of_thinking(options: Decoding) -> int | None:
    return options.thinking.end[-1] if isinstance(options.thinking, ThinkingBudget) else None
