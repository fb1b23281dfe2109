"""Token after token, in batches of ragged prompts, with as many steps as each token needs.

Shapes: B requests, T tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from recurrent_depth.checks import check_at_least, check_between, check_num_steps
from recurrent_depth.generation.adaptive import AdaptiveOutput, adaptive_forward, per_row
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
    """How to decode. Steps, exits and thinking may be given one a request, as a sequence.

    Args:
        max_new_tokens: tokens written after each prompt, at most.
        num_steps: steps of the core for a token, at most; None: the model's mean_recurrence.
        min_steps: steps of the core for a token, at least.
        exit: when a token has thought enough; None: all take num_steps.
        exit_prompt: tokens of the prompt may leave early too; False runs the prompt at num_steps.
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
    num_steps: int | Sequence[int] | None = None
    min_steps: int | Sequence[int] = 1
    exit: ExitRule | Sequence[ExitRule | None] | None = None
    exit_prompt: bool = True
    prefix_monotone: bool = True
    warm_start: bool = False
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[int, ...] = ()
    cache_budget: int | None = None
    thinking: ThinkingBudget | Sequence[ThinkingBudget | None] | None = None

    def __post_init__(self) -> None:
        check_at_least("max_new_tokens", self.max_new_tokens, 1)
        for name in ("num_steps", "min_steps"):
            value = getattr(self, name)
            check_num_steps(name, *(value if isinstance(value, Sequence) else [value]))
        check_at_least("temperature", self.temperature, 0)
        check_at_least("top_k", self.top_k, 1)
        check_between("top_p", self.top_p, 0, 1, low_open=True)
        check_at_least("cache_budget", self.cache_budget, 1)


@dataclass
class Decoded:
    """What was written and what it took.

    Attributes:
        tokens: new ids of each request, a stop id included.
        steps: steps of the core each of the passes took, per request: for the prompt its mean, then one a token.
        core_steps: steps of the core over all real tokens, prompts included.
        computed_steps: steps the machine ran, with those of padding and of rows and tokens that had left.
        flops: of those tokens (matrix products; attention at the mean context of a pass).
        cache_bytes: held by the cache.
    """

    tokens: list[list[int]]
    steps: list[list[float]] = field(default_factory=list)
    core_steps: int = 0
    computed_steps: int = 0
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
    each = Each(options, model.config, prompts)
    weight = model.lm_head.weight
    cache = RecurrentCache(
        model.config, B, width + options.max_new_tokens, each.deepest, options.cache_budget, weight.dtype, weight.device
    )
    names = name_tensor(requests, B, ids.device)
    result = Decoded([[] for _ in prompts], [[] for _ in prompts], cache_bytes=cache.num_bytes)
    running = [True] * B
    state: Tensor | None = None
    for _ in range(options.max_new_tokens):
        least = each.num_steps if state is None and not options.exit_prompt else each.min_steps
        output = adaptive_forward(
            model, ids, mask, cache, each.exit, each.num_steps, least, options.prefix_monotone,
            state if options.warm_start else None, last_logits_only=True,
        )  # fmt: skip
        _account(result, model, output, mask, running)
        tokens = draw(output.logits[:, -1], options, names, mask.sum(1))
        for row, drawn in enumerate(tokens.tolist()):
            if running[row]:
                running[row] = write(result, row, drawn, each.forcing[row], options, on_token)
        if not any(running):
            break
        last = [written[-1] for written in result.tokens]
        ids = torch.tensor(last, device=ids.device)[:, None]
        mask = torch.cat([mask, torch.tensor(running, device=ids.device).long()[:, None]], dim=1)
        state = output.state[:, -1:]
    return result


class Each:
    """The options of every request of a batch, and its thinking so far."""

    def __init__(self, options: Decoding, config: ModelConfig, prompts: Sequence[Sequence[int]]) -> None:
        B = len(prompts)
        self.num_steps: list[int] = per_row(options.num_steps or config.mean_recurrence, B, "num_steps")
        self.min_steps: list[int] = per_row(options.min_steps, B, "min_steps")
        self.exit: list[ExitRule | None] = per_row(options.exit, B, "exit")
        budgets: list[ThinkingBudget | None] = per_row(options.thinking, B, "thinking")
        self.forcing = [
            None if budget is None else Forcing(budget, list(prompt), options.stop)
            for budget, prompt in zip(budgets, prompts, strict=True)
        ]
        self.deepest = max(self.num_steps)


def shared_depth(options: Decoding, config: ModelConfig, mode: str) -> tuple[int, int]:
    """num_steps and min_steps for a mode that takes one of each for all requests."""
    if isinstance(options.num_steps, Sequence) or isinstance(options.min_steps, Sequence):
        raise ValueError(f"{mode} takes one num_steps and min_steps for all requests; give numbers, or decode plainly")
    steps = options.num_steps or config.mean_recurrence
    if not 1 <= options.min_steps <= steps:
        raise ValueError(f"min_steps {options.min_steps} must be between 1 and num_steps {steps}; change one of them")
    return steps, options.min_steps


def one_depth(options: Decoding, config: ModelConfig, mode: str, full_cache: bool) -> tuple[int, int]:
    """As `shared_depth`, for a mode that has neither exits, thinking nor warm starts."""
    steps, least = shared_depth(options, config, mode)
    if full_cache and options.cache_budget is not None and options.cache_budget < steps:
        raise ValueError(
            f"{mode} reads the entries of every step: cache_budget {options.cache_budget} must be at least num_steps "
            f"{steps}, or none"
        )
    wanted = {"exit": options.exit is not None, "thinking": options.thinking is not None}
    for name, given in (wanted | {"warm_start": options.warm_start}).items():
        if given:
            raise ValueError(f"{mode} does not go together with {name}; leave one out")
    return steps, least


def name_tensor(requests: Sequence[int] | None, B: int, device: torch.device) -> Tensor:
    """Names of the requests, [B]."""
    return torch.tensor(per_row(list(range(B)) if requests is None else requests, B, "requests"), device=device)


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], options: Decoding) -> int:
    """The longest prompt's length, once all prompts and new tokens fit the model."""
    width = max((len(prompt) for prompt in prompts), default=0)
    if not prompts or min(len(prompt) for prompt in prompts) == 0:
        raise ValueError("every prompt must have at least one token")
    if width + options.max_new_tokens > config.block_size:
        raise ValueError(
            f"the longest prompt ({width} tokens) and max_new_tokens ({options.max_new_tokens}) exceed block_size "
            f"{config.block_size}; shorten one"
        )
    return width


def padded(model: RecurrentDepthModel, prompts: Sequence[Sequence[int]], options: Decoding) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, T], padded on the left; checks that prompts and new tokens fit the model."""
    width = check_prompts(model.config, prompts, options)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    device = model.lm_head.weight.device
    return ids.to(device), mask.to(device)


def write(
    result: Decoded, row: int, drawn: int, forcing: Forcing | None, options: Decoding, on_token: OnToken | None
) -> bool:
    """Append the token, the model's or a forced one; returns whether the request goes on."""
    token = drawn
    if forcing is not None:
        forcing.forced()
        token = forcing.choose(drawn)
    written = result.tokens[row]
    written.append(token)
    told_to_stop = on_token is not None and bool(on_token(row, token))
    return len(written) < options.max_new_tokens and token not in options.stop and not told_to_stop


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


def _account(
    result: Decoded, model: RecurrentDepthModel, output: AdaptiveOutput, mask: Tensor, running: list[bool]
) -> None:
    """Count what the requests that still run have used in this pass."""
    T = output.depths.shape[1]
    contexts = mask.sum(1).tolist()
    result.computed_steps += output.computed
    for row, goes_on in enumerate(running):
        if goes_on:
            taken = output.depths[row][mask[row, -T:].bool()]
            count(result, model.config, row, len(taken), int(taken.sum()), contexts[row])


def count(result: Decoded, config: ModelConfig, row: int, tokens: int, core_steps: int, context: int) -> None:
    """Add a request's new tokens, whose last has `context` tokens before it, itself included."""
    result.steps[row].append(core_steps / tokens)
    result.core_steps += core_steps
    result.flops += flops_of(config, tokens, core_steps, context - (tokens - 1) / 2)


def flops_of(config: ModelConfig, tokens: int, core_steps: int, context: float) -> int:
    """Tokens through prelude, coda and head, and core steps over all of them, at a mean context."""
    layers = core_steps * config.n_layers_in_recurrent_block + tokens * config.unrolled_layers(0)
    once = attention_flops(config, 1)
    linear = core_steps * (step_flops(config, 1) - config.n_layers_in_recurrent_block * once)
    linear += tokens * (outer_flops(config, 1) - config.unrolled_layers(0) * once)
    return linear + round(4 * config.n_embd * layers * context)
