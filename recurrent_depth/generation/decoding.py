"""Token after token, in batches of ragged prompts, with as many steps as each token needs.

Shapes: B requests, T tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from recurrent_depth.generation.adaptive import adaptive_forward
from recurrent_depth.generation.cache import RecurrentCache
from recurrent_depth.generation.exits import ExitRule
from recurrent_depth.generation.forcing import Forcing, ThinkingBudget
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.flops import attention_flops, outer_flops, step_flops
from recurrent_depth.model.random import SAMPLE_STREAM, uniform
from recurrent_depth.model.transformer import RecurrentDepthModel

OnToken = Callable[[int, int], bool | None]
"""Called with (request, token) for every token as it is written; returning True ends the request."""


@dataclass(frozen=True)
class Decoding:
    """How to decode.

    Args:
        max_new_tokens: tokens written after each prompt, at most.
        num_steps: steps of the core, at most; None: the model's mean_recurrence.
        min_steps: steps of the core, at least.
        exit: when a token has thought enough; None: all take num_steps.
        prefix_monotone: in a prompt, tokens leave in order (see `adaptive_forward`).
        warm_start: start a token's state from its predecessor's last one (continuous chain of thought).
        temperature: 0 takes the likeliest token.
        top_k: sample among that many tokens.
        top_p: sample among the likeliest tokens that have this probability together.
        seed: of sampling; a draw depends on (seed, request, position) alone.
        stop: ids that end a request; they are written.
        cache_budget: recurrences the cache keeps; None keeps all.
        thinking: budget of thinking tokens.
    """

    max_new_tokens: int = 64
    num_steps: int | None = None
    min_steps: int = 1
    exit: ExitRule | None = None
    prefix_monotone: bool = True
    warm_start: bool = False
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[int, ...] = ()
    cache_budget: int | None = None
    thinking: ThinkingBudget | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; it must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or (self.top_k is not None and self.top_k < 1):
            raise ValueError("temperature must be 0 or more, top_p in (0, 1], top_k at least 1 or none")


@dataclass
class Decoded:
    """What was written and what it took.

    Attributes:
        tokens: new ids of each request, a stop id included.
        steps: steps of the core each of the passes took, per request: for the prompt its mean, then one a token.
        core_steps: steps of the core over all real tokens, prompts included.
        flops: of those tokens (matrix products; attention at the mean context of a pass).
        cache_bytes: held by the cache.
    """

    tokens: list[list[int]]
    steps: list[list[float]] = field(default_factory=list)
    core_steps: int = 0
    flops: int = 0
    cache_bytes: int = 0


@torch.inference_mode()
def decode(
    model: RecurrentDepthModel,
    prompts: Sequence[Sequence[int]],
    options: Decoding = Decoding(),
    *,
    requests: Sequence[int] | None = None,
    on_token: OnToken | None = None,
) -> Decoded:
    """Continue every prompt. A request's tokens and exits do not depend on the others in the batch.

    Args:
        prompts: ids, ragged.
        requests: names of the requests, for sampling; default 0, 1, ...
        on_token: for streaming.
    """
    ids, mask = padded(model, prompts, options)
    B, width = ids.shape
    steps = options.num_steps or model.config.mean_recurrence
    weight = model.lm_head.weight
    length = width + options.max_new_tokens
    cache = RecurrentCache(model.config, B, length, steps, options.cache_budget, weight.dtype, weight.device)
    names = torch.tensor(list(requests) if requests is not None else list(range(B)), device=weight.device)
    forcing = [Forcing(options.thinking, list(prompt)) if options.thinking else None for prompt in prompts]
    result = Decoded([[] for _ in prompts], [[] for _ in prompts], cache_bytes=cache.num_bytes)
    running = [True] * B
    state: Tensor | None = None
    for _ in range(options.max_new_tokens):
        output = adaptive_forward(
            model, ids, mask, cache, options.exit, steps, options.min_steps, options.prefix_monotone, state
        )
        _account(result, model, output.depths, mask, running)
        tokens = draw(output.logits[:, -1], options, names, mask.sum(1))
        for row, drawn in enumerate(tokens.tolist()):
            if running[row]:
                running[row] = _write(result, row, drawn, forcing[row], options, on_token)
        if not any(running):
            break
        last = [written[-1] for written in result.tokens]
        ids = torch.tensor(last, device=ids.device)[:, None]
        mask = torch.cat([mask, torch.tensor(running, device=ids.device).long()[:, None]], dim=1)
        state = output.state[:, -1:] if options.warm_start else None
    return result


def padded(model: RecurrentDepthModel, prompts: Sequence[Sequence[int]], options: Decoding) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, T], padded on the left; checks that prompts and new tokens fit the model."""
    width = max((len(prompt) for prompt in prompts), default=0)
    if not prompts or min(len(prompt) for prompt in prompts) == 0:
        raise ValueError("every prompt must have at least one token")
    if width + options.max_new_tokens > model.config.block_size:
        raise ValueError(
            f"the longest prompt ({width} tokens) and max_new_tokens ({options.max_new_tokens}) exceed block_size "
            f"{model.config.block_size}; shorten one"
        )
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    device = model.lm_head.weight.device
    return ids.to(device), mask.to(device)


def _write(
    result: Decoded, row: int, drawn: int, forcing: Forcing | None, options: Decoding, on_token: OnToken | None
) -> bool:
    """Append the token, the model's or a forced one; returns whether the request goes on."""
    token = drawn
    if forcing is not None:
        forcing.forced()
        token = forcing.choose(drawn)
    result.tokens[row].append(token)
    told_to_stop = on_token is not None and on_token(row, token)
    return token not in options.stop and not told_to_stop


def draw(logits: Tensor, options: Decoding, names: Tensor, positions: Tensor) -> Tensor:
    """logits [B, V] -> token [B]; sampling adds Gumbel noise that is a function of (seed, request, position)."""
    if options.temperature == 0:
        return logits.argmax(-1)
    logits = logits / options.temperature
    if options.top_k is not None and options.top_k < logits.shape[-1]:
        smallest = logits.topk(options.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if options.top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.masked_fill((before >= options.top_p).gather(-1, order.argsort(-1)), -torch.inf)
    u = uniform(names, positions[:, None], logits.shape[-1], seed=options.seed, stream=SAMPLE_STREAM)[:, 0]
    return (logits - (-u.to(logits.dtype).log()).log()).argmax(-1)


def _account(result: Decoded, model: RecurrentDepthModel, depths: Tensor, mask: Tensor, running: list[bool]) -> None:
    """Count what the requests that still run have used in this pass."""
    config, T = model.config, depths.shape[1]
    contexts = mask.sum(1).tolist()
    for row, goes_on in enumerate(running):
        if not goes_on:
            continue
        taken = depths[row][mask[row, -T:].bool()]
        tokens, total = len(taken), int(taken.sum())
        result.steps[row].append(total / tokens)
        result.core_steps += total
        context = contexts[row] - (tokens - 1) / 2  # mean over the new tokens
        result.flops += flops_of(config, tokens, total, context)


def flops_of(config: ModelConfig, tokens: int, core_steps: int, context: float) -> int:
    """Tokens through prelude, coda and head, and core steps over all of them, at a mean context."""
    layers = core_steps * config.n_layers_in_recurrent_block + tokens * config.unrolled_layers(0)
    once = attention_flops(config, 1)
    linear = core_steps * (step_flops(config, 1) - config.n_layers_in_recurrent_block * once)
    linear += tokens * (outer_flops(config, 1) - config.unrolled_layers(0) * once)
    return linear + round(4 * config.n_embd * layers * context)
