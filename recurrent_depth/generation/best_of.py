"""Latent best-of-N: decode each request from several initial states, and choose one of the answers.

Samples of a request differ in their initial states alone: sample 0 starts from zeros, as plain decoding does, and
sample n from the random state of `seed + n`. If tokens are sampled, all samples draw with the same noise.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from recurrent_depth.generation.config import BestOf
from recurrent_depth.generation.engine import Decoder
from recurrent_depth.generation.request import Decoded, Decoding, OnToken
from recurrent_depth.model.config import ModelConfig

AnswerOf = Callable[[list[int]], Hashable]
"""Returns what two answers are compared by, from the tokens of a request."""


@dataclass
class Chosen(Decoded):
    """The chosen answers. Tokens, steps and scores are those of the chosen samples; the cost is that of all samples.

    Attributes:
        chosen: number of the chosen sample of each request.
        samples: all samples; sample n of request b is request b N + n there.
    """

    chosen: list[int] = field(default_factory=list)
    samples: Decoded = field(default_factory=lambda: Decoded([]))


def decode_best_of(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    options: Decoding,
    best_of: BestOf,
    *,
    answer: AnswerOf = tuple,
    on_token: OnToken | None = None,
) -> Chosen:
    """Decode every prompt from several initial states, all in one batch, and choose an answer for each.

    Args:
        options: see `Decoding`; without `state_seed`.
        answer: what answers are compared by in a vote; default the tokens.
        on_token: see `OnToken`; called with the number of the sample, b N + n.
    """
    N = best_of.samples
    _check(decoder.model.model_config, options, best_of)
    seeds = [best_of.seed + n if n else None for _ in prompts for n in range(N)]
    repeated: dict[str, Any] = {
        name: [value for value in values for _ in range(N)]
        for name in ("num_steps", "min_steps", "exit", "thinking")
        if isinstance(values := getattr(options, name), Sequence)
    }
    samples = decoder.generate(
        [prompt for prompt in prompts for _ in range(N)],
        replace(options, state_seed=seeds, scores=True, **repeated),
        requests=[b for b in range(len(prompts)) for _ in range(N)],
        on_token=on_token,
    )
    chosen = [choose(samples, range(b * N, (b + 1) * N), best_of.choose_by, answer) for b in range(len(prompts))]
    taken = [b * N + n for b, n in enumerate(chosen)]
    of_samples: dict[str, Any] = {
        name: [getattr(samples, name)[s] for s in taken] for name in ("tokens", "steps", "log_probabilities", "changes")
    }
    costs = {f.name: getattr(samples, f.name) for f in fields(Decoded) if f.name not in of_samples}
    return Chosen(**of_samples, **costs, chosen=chosen, samples=samples)


def choose(samples: Decoded, of: Sequence[int], choose_by: str, answer: AnswerOf = tuple) -> int:
    """Return the place in `of` of the chosen sample. Of equal samples the first is chosen."""
    if choose_by == "vote":
        answers = [answer(samples.tokens[s]) for s in of]
        return answers.index(Counter(answers).most_common(1)[0][0])
    if choose_by == "likelihood":
        marks = [statistics.fmean(samples.log_probabilities[s]) for s in of]
    else:
        marks = [-statistics.fmean(samples.changes[s]) for s in of]
    return max(range(len(marks)), key=marks.__getitem__)


def _check(config: ModelConfig, options: Decoding, best_of: BestOf) -> None:
    if options.state_seed is not None:
        raise ValueError(f"state_seed is {options.state_seed}; best_of sets it for every sample: give best_of.seed")
    if best_of.samples > 1 and (config.state_init == "zero" or config.state_std == 0):
        raise ValueError(
            f"best_of.samples is {best_of.samples}, but this model always starts from a zero state (its state_init is "
            f"{config.state_init}), so that all samples would be equal; leave best_of out, or take a model that was "
            "trained with state_init like-init"
        )
