"""Options of generation as numbers and texts, for configurations and the command line. Imports no torch.

`recurrent_depth.generation.request` has the options of a call of the decoder, with token ids and rule objects.
"""

from dataclasses import dataclass
from typing import Literal

from recurrent_depth.checks import check_at_least, check_between, check_num_steps


@dataclass(frozen=True, kw_only=True)
class ThinkingLimits:
    """Limits of the thinking tokens of a request (s1, arXiv 2501.19393).

    Args:
        at_most: thinking tokens after which the end of thinking is written; tokens of `wait` count.
        at_least: thinking tokens before which an end is always replaced by `wait`, independent of `rounds`.
        rounds: number of ends of thinking that are replaced by `wait`, if `at_most` allows it.
    """

    at_most: int = 256
    at_least: int = 0
    rounds: int = 0

    def __post_init__(self) -> None:
        check_at_least("at_most", self.at_most, 0)
        check_between("at_least", self.at_least, 0, self.at_most)
        check_at_least("rounds", self.rounds, 0)


@dataclass(frozen=True, kw_only=True)
class Thinking(ThinkingLimits):
    """A thinking part before the answer, between two delimiters, with limits.

    Args:
        begin, end: delimiters; each must be one token of the tokenizer.
        wait: text that replaces an end of thinking that comes too early.
    """

    begin: str = "<|begin_think|>"
    end: str = "<|end_think|>"
    wait: str = "Wait"


@dataclass(frozen=True)
class Speculation:
    """Draft tokens with few iterations, then run the remaining iterations for all drafts at once.

    Args:
        steps: core iterations of a draft; must be fewer than num_steps.
        tokens: tokens drafted per round.
    """

    steps: int = 4
    tokens: int = 4

    def __post_init__(self) -> None:
        check_num_steps("steps", self.steps)
        check_at_least("tokens", self.tokens, 1)


@dataclass(frozen=True)
class Wavefront:
    """Iterate several positions of a request at the same time. threshold, average and in_order: not in exact mode.

    Args:
        steps: core iterations per pass.
        width: largest number of positions of a request in flight.
        exact: write the same tokens as plain decoding (needs a cache of all iterations); false is faster, approximate.
        threshold: relative change of the state in a pass below which a position has converged; it also converges
            num_steps iterations after all positions before it.
        average: weight of the earlier embedding in the moving average that a position reads.
        in_order: a position converges only after all positions before it (equation 3 of the paper); false freezes
            everything before the last converged position (algorithm 2 of the paper and the released code).
    """

    steps: int = 4
    width: int = 128
    exact: bool = True
    threshold: float = 0.03
    average: float = 0.1
    in_order: bool = True

    def __post_init__(self) -> None:
        check_num_steps("steps", self.steps)
        check_at_least("width", self.width, 1)
        check_at_least("threshold", self.threshold, 0)
        check_between("average", self.average, 0, 1, high_open=True)


@dataclass(frozen=True)
class Refill:
    """Keep the batch full: a finished token or request is replaced by the next one without waiting for the others.

    Args:
        lanes: requests in the batch at a time.
        together: number of stopped lanes for which coda, head and the next prelude run together (fewer if no lane is
            still iterating); null: half of the requests in the batch.
    """

    lanes: int = 8
    together: int | None = None

    def __post_init__(self) -> None:
        check_at_least("lanes", self.lanes, 1)
        check_between("together", self.together, 1, self.lanes)


@dataclass(frozen=True)
class Captured:
    """Capture the iterations of decoding as CUDA graphs; on a CPU the same code runs without graphs.

    The tokens equal those of plain decoding. All requests have the same num_steps, min_steps and exit rule.
    """


Mode = Speculation | Wavefront | Refill | Captured
"""How to decode; without a mode, all requests form one batch that is decoded token by token."""


ChooseBy = Literal["likelihood", "convergence", "vote"]


@dataclass(frozen=True)
class BestOf:
    """Decode each request from several initial states in one batch, and choose one answer.

    Args:
        samples: initial states per request: zeros, and random ones; the cost is that of so many requests.
        choose_by: `likelihood` takes the answer with the largest mean log-probability of a token, `convergence` the one
            whose states changed least in their last iterations, `vote` the most frequent answer.
        seed: the random state of sample n (from 1) is that of seed + n.
    """

    samples: int = 8
    choose_by: ChooseBy = "likelihood"
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least("samples", self.samples, 1)
        check_at_least("seed", self.seed, 0)


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How to decode. speculation, wavefront, refill and captured are modes; at most one of them can be given.

    Args:
        num_steps: largest number of core iterations per token; null takes the model's default.
        min_steps: smallest number of core iterations per token.
        exit: rule that stops iterating a converged token: state-change, kl, entropy, argmax, gate (a model with an exit
            gate), or your own class as package.module:Class; null always runs num_steps.
        exit_threshold: threshold of the rule (iterations in a row for argmax, probability to have stopped for gate);
            null takes the default of the rule.
        exit_prompt: let tokens of the prompt stop early too; false runs the prompt at num_steps.
        prefix_monotone: stop the tokens of a prompt in order; false can stop a token before the tokens it depends on.
        warm_start: start the state of a token from the last state of the previous token instead of zeros.
        cache_budget: iterations whose keys and values are kept; null keeps all.
        speculation: speculative decoding: draft with few iterations and verify.
        wavefront: iterate several positions of a request at the same time.
        refill: keep the batch full.
        captured: replay the iterations as CUDA graphs, without launch overhead.
        seed: seed of sampling.
        thinking: open a thinking part with limits.
        best_of: decode each request from several initial states and choose one answer; without a mode, or with refill.
    """

    num_steps: int | None = None
    min_steps: int = 1
    exit: str | None = None
    exit_threshold: float | None = None
    exit_prompt: bool = True
    prefix_monotone: bool = True
    warm_start: bool = False
    cache_budget: int | None = None
    speculation: Speculation | None = None
    wavefront: Wavefront | None = None
    refill: Refill | None = None
    captured: bool = False
    seed: int = 0
    thinking: Thinking | None = None
    best_of: BestOf | None = None

    def __post_init__(self) -> None:
        check_num_steps("num_steps", self.num_steps)
        check_num_steps("min_steps", self.min_steps)
        if self.num_steps is not None:
            check_between("min_steps", self.min_steps, 1, self.num_steps)
        check_at_least("exit_threshold", self.exit_threshold, 0)
        if self.exit_threshold is not None and self.exit is None:
            raise ValueError("exit_threshold is given without exit; name the rule, for example exit kl")
        check_at_least("cache_budget", self.cache_budget, 1)
        check_at_least("seed", self.seed, 0)
        mode = self.mode()
        if self.best_of is not None and mode is not None and not isinstance(mode, Refill):
            name = type(mode).__name__.lower()
            raise ValueError(f"best_of is given together with {name}; it needs plain decoding or refill: leave one out")

    def mode(self) -> Mode | None:
        """Return the chosen mode; None for plain decoding."""
        modes: dict[str, Mode | None] = {
            "speculation": self.speculation,
            "wavefront": self.wavefront,
            "refill": self.refill,
            "captured": Captured() if self.captured else None,
        }
        given = {name: mode for name, mode in modes.items() if mode is not None}
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each choose a mode; give only one of them")
        return next(iter(given.values()), None)
