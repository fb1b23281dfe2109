"""What a state predicts: the distribution of the next token after coda and head.

Shapes: t tokens, V vocabulary, K candidates.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Predictions(NamedTuple):
    """The predictions of some tokens at one iteration.

    Attributes:
        top_ids, top_probabilities: the most probable tokens, most probable first, [t, K].
        entropy: in nats, [t].
        kl: KL(p* || p) in nats, [t]: what is lost by this prediction if that of the converged state is right.
    """

    top_ids: Tensor
    top_probabilities: Tensor
    entropy: Tensor
    kl: Tensor


def predict(logits: Tensor, converged_logits: Tensor, top: int) -> Predictions:
    """Return the predictions of logits [t, V]; `converged_logits` are those of the converged state."""
    logp, target = logits.log_softmax(-1), converged_logits.log_softmax(-1)
    probabilities, ids = logp.topk(min(top, logp.shape[-1]), dim=-1)
    entropy = -(logp.exp() * logp).sum(-1)
    kl = (target.exp() * (target - logp)).sum(-1)
    return Predictions(ids, probabilities.exp(), entropy, kl.clamp(min=0))


def token_chunks(tokens: int, vocab_size: int, elements: int = 2**23) -> list[slice]:
    """Return slices of tokens whose logits have at most about `elements` numbers."""
    size = max(1, elements // vocab_size)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


class SettledPrediction:
    """The first iteration from which the most probable token stays that of the converged state.

    Attributes:
        last_other: last iteration at which it was another token, [T]; 0: it never was.
    """

    def __init__(self, converged_best: Tensor) -> None:
        self.converged_best = converged_best
        self.last_other = torch.zeros_like(converged_best, dtype=torch.int32)

    def update(self, step: int, best: Tensor, tokens: slice) -> None:
        """Add the most probable tokens [t] of some tokens after iteration `step`."""
        self.last_other[tokens][best != self.converged_best[tokens]] = step

    def first(self, num_steps: int) -> Tensor:
        """Return the iteration, [T]; 0: the prediction was still another one after num_steps iterations."""
        return torch.where(self.last_other == num_steps, 0, self.last_other + 1)
