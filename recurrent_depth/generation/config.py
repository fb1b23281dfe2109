"""Options of generation: how deep to iterate, which mode decodes, how much to think. Imports no torch.

These are numbers and texts, as configurations and the command line have them. `recurrent_depth.generation.request` has
the options of a call of the engine, with ids and rules in their place.
"""

from dataclasses import dataclass

from recurrent_depth.checks import check_at_least, check_between, check_num_steps


@dataclass(frozen=True, kw_only=True)
class ThinkingLimits:
    """Thinking tokens of a request (s1, arXiv 2501.19393).

    Args:
        at_most: tokens after which the end of thinking is written, those of `wait` included.
        at_least: tokens before which an end is always replaced by `wait`, whatever `rounds` says.
        rounds: ends of thinking that are replaced by `wait`, if `at_most` allows it.
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
    """A thinking part before the answer, between two delimiters, kept within limits.

    Args:
        begin, end: delimiters, one token of the tokenizer each.
        wait: text written in place of an end that comes too early.
    """

    begin: str = "<|begin_think|>"
    end: str = "<|end_think|>"
    wait: str = "Wait"


@dataclass(frozen=True)
class Speculation:
    """Draft tokens with few iterations, then run the remaining iterations for all of them at once.

    Args:
        steps: core iterations of a draft; fewer than num_steps.
        tokens: tokens drafted per round.
    """

    steps: int = 4
    tokens: int = 4

    def __post_init__(self) -> None:
        check_num_steps("steps", self.steps)
        check_at_least("tokens", self.tokens, 1)


@dataclass(frozen=True)
class Wavefront:
    """Positions of one request iterate at the same time. Threshold, average and in_order are not used in exact mode.

    Args:
        steps: core iterations per pass.
        width: positions in flight of a request, at most.
        exact: write what plain decoding writes (needs a cache of all iterations); false is faster and approximate.
        threshold: a position has converged once a pass changes its state by less, relatively, or num_steps iterations
            after everything before it had converged.
        average: weight of the earlier embedding in the moving average a position reads.
        in_order: a position counts as converged only if all before it have (equation 3 of the paper); false freezes
            everything before the last one that has (its algorithm 2 and the released code).
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
    """Keep a batch full: a token or request that is done is followed by the next at once.

    Args:
        lanes: requests in the batch at a time.
        together: requests whose tokens have stopped wait until so many have (or none iterates any more), so that coda,
            head and the prelude of what follows run once for all; null: half of those in the batch.
    """

    lanes: int = 8
    together: int | None = None

    def __post_init__(self) -> None:
        check_at_least("lanes", self.lanes, 1)
        check_between("together", self.together, 1, self.lanes)


@dataclass(frozen=True)
class Captured:
    """Capture the iterations of decoding as CUDA graphs; on a CPU the same work runs without graphs.

    The tokens equal plain decoding's. All requests take the same num_steps, min_steps and exit rule.
    """


Mode = Speculation | Wavefront | Refill | Captured
"""How to decode; without one, all requests form one batch that decodes token after token."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How to decode. At most one of speculation, wavefront, refill and captured is given: they are modes.

    Args:
        num_steps: core iterations per token, at most; null takes the model's.
        min_steps: core iterations per token, at least.
        exit: stop iterating a token when it has converged: state-change, kl, entropy, argmax, or a class of your own as
            package.module:Class; null always runs num_steps.
        exit_threshold: threshold of the rule (iterations in a row for argmax); null takes the published value.
        exit_prompt: tokens of the prompt may stop early too; false runs the prompt at num_steps.
        prefix_monotone: tokens of a prompt stop in order; false repeats a known failure.
        warm_start: start a token's state from the last one of the token before it.
        cache_budget: iterations whose keys and values are kept; null keeps all.
        speculation: draft and verify.
        wavefront: several positions of a request at the same time.
        refill: keep the batch full.
        captured: replay the iterations as CUDA graphs, so that launching them costs no time.
        seed: of sampling.
        thinking: open a thinking part and keep it within limits.
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

    def __post_init__(self) -> None:
        check_num_steps("num_steps", self.num_steps)
        check_num_steps("min_steps", self.min_steps)
        if self.num_steps is not None:
            check_between("min_steps", self.min_steps, 1, self.num_steps)
        check_at_least("exit_threshold", self.exit_threshold, 0)
        check_at_least("cache_budget", self.cache_budget, 1)
        check_at_least("seed", self.seed, 0)
        self.mode()

    def mode(self) -> Mode | None:
        """Return the mode these options choose; None decodes plainly."""
        modes: dict[str, Mode | None] = {
            "speculation": self.speculation,
            "wavefront": self.wavefront,
            "refill": self.refill,
            "captured": Captured() if self.captured else None,
        }
        given = {name: mode for name, mode in modes.items() if mode is not None}
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each choose a mode; give one of them")
        return next(iter(given.values()), None)
