"""Cross-entropy over a linear head, summed over valid targets. Shapes: B batch, T tokens, D width, V vocabulary."""

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int | None = None) -> Tensor:
    """Sum of -log softmax(hidden @ weightᵀ)[target] over targets that are not -100.

    Args:
        hidden: [B, T, D].
        weight: [V, D].
        targets: [B, T], aligned with `hidden` (nothing is shifted here).
        chunk_size: tokens whose logits exist at one time, recomputed in the backward pass; None: all.

    Returns a scalar in fp32 (fp64 for fp64 input). For a mean divide by `valid_targets`, summed over ranks.
    """
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    if chunk_size is None or len(targets) <= chunk_size:
        return _summed(hidden, weight, targets)
    losses = [
        checkpoint(_summed, h, weight, t, use_reentrant=False)
        for h, t in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
    ]
    return sum(losses[1:], losses[0])


def _summed(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = wide(F.linear(hidden, weight))
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")


def wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x if x.element_size() >= 4 else x.float()


def valid_targets(targets: Tensor) -> Tensor:
    """How many targets count, as a scalar tensor."""
    return (targets != IGNORE_INDEX).sum()


def shift_labels(labels: Tensor) -> Tensor:
    """Targets [B, T] of labels [B, T] in the Hugging Face convention: the target of position t is label t + 1."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
