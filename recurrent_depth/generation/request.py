"""The requests of a call: their options, the tokens written, and the cost.

Shapes: B requests, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from recurrent_depth.checks import check_at_least, check_between, check_num_steps
from recurrent_depth.generation.exits import ExitRule
from recurrent_depth.generation.forcing import Forcing, ThinkingBudget
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.flops import attention_flops, block_flops
from recurrent_depth.model.random import SAMPLE_STREAM, uniform
from recurrent_depth.model.transformer import Transformer

OnToken = Callable[[int, int], bool | None]
"""Called with (request, token) for every written token; returning True ends the request."""


class DecodableModel(Protocol):
    """A model that can be decoded: the training class and the transformers class."""

    transformer: Transformer
    lm_head: nn.Linear
    freqs_cis: Tensor

    @property
    def model_config(self) -> ModelConfig: ...


@dataclass(frozen=True)
class Decoding:
    """How to decode. num_steps, min_steps, exit, thinking and state_seed may be sequences, one value per request.

    Args:
        max_new_tokens: largest number of tokens written after each prompt.
        num_steps: largest number of core iterations per token; None: mean_recurrence of the model.
        min_steps: smallest number of core iterations per token.
        exit: rule that stops iterating a converged token; None: all tokens take num_steps.
        exit_prompt: let tokens of the prompt stop early too; False runs the prompt at num_steps.
        prefix_monotone: stop a token of a prompt only after every earlier one. Without it a token that has not yet
            received information from earlier tokens can look converged and stop with a wrong answer
            (docs/decoding-benchmarks.md).
        warm_start: start the state of a token from the last state of the previous one (continuous chain of thought).
        temperature: sampling temperature; 0 takes the most probable token.
        top_k: sample among this many tokens.
        top_p: sample among the most probable tokens with this total probability.
        seed: seed of sampling; a draw is a function of (seed, number of the request, position).
        stop: ids that end a request; they are written.
        cache_budget: iterations whose keys and values are kept; None keeps all.
        released_cache: with a budget, read entries of stopped tokens by the rule of the released code (`read_place`).
        thinking: limits of thinking tokens.
        state_seed: seed of a random initial state, a function of (seed, position, channel); None: zeros.
        scores: record the log-probability of every written token, and the change of the state it was predicted from.
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
    released_cache: bool = False
    thinking: ThinkingBudget | Sequence[ThinkingBudget | None] | None = None
    state_seed: int | Sequence[int | None] | None = None
    scores: bool = False

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
    """The written tokens and their cost.

    Attributes:
        tokens: new ids of each request, a stop id included.
        steps: core iterations of each request: the mean over its prompt, then one number per new token (speculation:
            two per round, drafts and check).
        core_iterations: core iterations summed over all tokens, prompts and dropped drafts included.
        computed_iterations: core iterations that were run; more if lanes that had stopped were computed.
        flops: FLOPs of the tokens (matrix products; attention at the mean context of a pass).
        cache_bytes: size of the cache.
        passes: passes of the core over the tokens in flight (refilled batches, wavefront).
        drafted, accepted: drafts that were checked, and those that were right (speculation, wavefront).
        log_probabilities: with `scores`, of each written token, in nats (temperature 1, all tokens).
        changes: with `scores`, per written token: |s_i - s_{i-1}| / |s_i| in the last iteration of the token before it.
    """

    tokens: list[list[int]]
    steps: list[list[float]] = field(default_factory=list)
    core_iterations: int = 0
    computed_iterations: int = 0
    flops: int = 0
    cache_bytes: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    log_probabilities: list[list[float]] = field(default_factory=list)
    changes: list[list[float]] = field(default_factory=list)


class Stopping(NamedTuple):
    """When a token stops iterating: after `most` iterations, or after at least `least` when its rule fires."""

    most: int
    least: int = 1
    rule: ExitRule | None = None
    in_order: bool = True


class Requests:
    """The requests of one call, numbered 0, 1, ... in the order of the prompts.

    Args:
        names: numbers that sampling is a function of; default the order of the prompts.
        on_token: see `OnToken`.
    """

    def __init__(
        self,
        model: DecodableModel,
        prompts: Sequence[Sequence[int]],
        options: Decoding,
        names: Sequence[int] | None = None,
        on_token: OnToken | None = None,
    ) -> None:
        B, self.config = len(prompts), model.model_config
        self.longest = _checked(self.config, prompts, options)
        self.prompts, self.options, self.on_token = [list(prompt) for prompt in prompts], options, on_token
        most: list[int] = per_request(options.num_steps or self.config.mean_recurrence, B, "num_steps")
        least: list[int] = per_request(options.min_steps, B, "min_steps")
        for r, m in zip(most, least, strict=True):
            if m > r:
                raise ValueError(f"min_steps {m} must be between 1 and num_steps {r}; change one of them")
        rules: list[ExitRule | None] = per_request(options.exit, B, "exit")
        self.stopping = [
            Stopping(r, m, rule, options.prefix_monotone) for r, m, rule in zip(most, least, rules, strict=True)
        ]
        budgets: list[ThinkingBudget | None] = per_request(options.thinking, B, "thinking")
        self.forcing = [
            None if budget is None else Forcing(budget, prompt, options.stop)
            for budget, prompt in zip(budgets, self.prompts, strict=True)
        ]
        self.state_seeds: list[int | None] = per_request(options.state_seed, B, "state_seed")
        named = per_request(list(range(B)) if names is None else names, B, "requests")
        self.names = torch.tensor(named, device=model.lm_head.weight.device)
        self.running = [True] * B
        empty: list[list[list[Any]]] = [[[] for _ in prompts] for _ in range(4)]
        self.result = Decoded(empty[0], empty[1], log_probabilities=empty[2], changes=empty[3])

    @property
    def most_steps(self) -> int:
        return max(stopping.most for stopping in self.stopping)

    @property
    def room(self) -> int:
        """Return the number of tokens that the longest request may have."""
        return self.longest + self.options.max_new_tokens

    def stops(self, request: int) -> Stopping:
        """Return when the next token of a request stops; for a request without new tokens, the tokens of its prompt."""
        stopping = self.stopping[request]
        if self.options.exit_prompt or self.result.tokens[request]:
            return stopping
        return stopping._replace(rule=None)

    def one_depth(self, mode: str) -> Stopping:
        """Return when all tokens stop, for a mode that needs the same values for all requests."""
        for name, what in (("exit", "exit rule"), ("num_steps", "num_steps"), ("min_steps", "min_steps")):
            if isinstance(getattr(self.options, name), Sequence):
                raise ValueError(f"{mode} takes one {what} for all requests; give one value, or decode without a mode")
        return self.stopping[0]

    def refuse(self, mode: str, *names: str, full_cache: bool = False) -> None:
        """Raise if one of these options is given, or if the mode needs a full cache and cache_budget is smaller."""
        for name in names:
            value = getattr(self.options, name)
            if value is not None and value is not False:
                raise ValueError(f"{mode} cannot be combined with {name}; leave one out")
        budget = self.options.cache_budget
        if full_cache and budget is not None and budget < self.most_steps:
            raise ValueError(
                f"{mode} reads the entries of every iteration: cache_budget {budget} must be at least num_steps "
                f"{self.most_steps}, or left out"
            )

    def draw(self, logits: Tensor, requests: Sequence[int], positions: Sequence[int]) -> list[int]:
        """Return a token for each row of logits [n, V], at these positions of these requests."""
        if self.options.temperature == 0:
            return logits.argmax(-1).tolist()  # host: it writes the tokens and decides which requests end
        at = torch.tensor(positions, device=self.names.device)
        return draw(logits, self.options, self.names[list(requests)], at).tolist()  # host: as above

    def record_scores(self, requests: Sequence[int], logits: Tensor) -> None:
        """Record the log-probabilities of the tokens that were just written, from the logits [n, V] behind them."""
        tokens = torch.tensor([self.result.tokens[request][-1] for request in requests], device=logits.device)
        found = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        for request, value in zip(requests, found.tolist(), strict=True):  # host: scores decide on answers there
            self.result.log_probabilities[request].append(value)

    def write(self, request: int, drawn: int) -> bool:
        """Append the drawn token, or a forced one; return whether the request continues."""
        forcing, written = self.forcing[request], self.result.tokens[request]
        token = drawn if forcing is None else forcing.choose(drawn)
        written.append(token)
        ends = self.on_token is not None and bool(self.on_token(request, token))
        continues = not ends and len(written) < self.options.max_new_tokens and token not in self.options.stop
        self.running[request] = continues
        return continues

    def count(self, request: int, tokens: int, core_iterations: int, context: int, started: int | None = None) -> None:
        """Add a pass of a request over tokens to the cost; `context` is the column of the last one, from 1.

        `started` of the tokens go through the prelude in this pass; None: all of them.
        """
        self.result.steps[request].append(core_iterations / tokens)
        self.result.core_iterations += core_iterations
        self.add_flops(tokens if started is None else started, core_iterations, tokens, context - (tokens - 1) / 2)

    def add_flops(self, started: int, core_iterations: int, read: int, context: float) -> None:
        """Add the FLOPs of tokens that start (prelude), of core iterations, and of tokens that are read (coda, head).

        `context` is the mean number of tokens that one of them attends to.
        """
        c = self.config
        layers = (
            started * c.n_layers_in_prelude
            + core_iterations * c.n_layers_in_recurrent_block
            + read * c.n_layers_in_coda
        )
        linear = layers * (block_flops(c, 1) - attention_flops(c, 1))
        linear += 2 * (started + core_iterations) * c.n_embd**2 + 2 * read * c.n_embd * c.vocab_size
        self.result.flops += linear + round(layers * context * attention_flops(c, 1))


def per_request(value: Any, requests: int, name: str) -> list[Any]:
    """Return a list with one value per request; a single value is repeated."""
    if not isinstance(value, Sequence):
        return [value] * requests
    if len(value) != requests:
        raise ValueError(f"{name} has {len(value)} values for {requests} requests; give one value, or one per request")
    return list(value)


def _checked(config: ModelConfig, prompts: Sequence[Sequence[int]], options: Decoding) -> int:
    """Return the length of the longest prompt. Raise unless all prompts and new tokens fit the model."""
    longest = max((len(prompt) for prompt in prompts), default=0)
    if not prompts or min(len(prompt) for prompt in prompts) == 0:
        raise ValueError("every prompt must have at least one token")
    if longest + options.max_new_tokens > config.block_size:
        raise ValueError(
            f"the longest prompt ({longest} tokens) and max_new_tokens ({options.max_new_tokens}) exceed block_size "
            f"{config.block_size}; shorten the prompt or lower max_new_tokens"
        )
    return longest


def draw(logits: Tensor, options: Decoding, names: Tensor, positions: Tensor) -> Tensor:
    """Return tokens [B] from logits [B, V]; sampling adds Gumbel noise, a function of (seed, name, position)."""
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
