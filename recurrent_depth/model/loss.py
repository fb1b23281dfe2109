"""Cross-entropy over a linear head, summed over valid targets.

Shapes: B batch, T tokens, D width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
"""Target of positions without a loss, as in torch and transformers."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int | None = None) -> Tensor:
    """Return the sum of -log softmax(hidden @ weightᵀ)[target] over targets that are not IGNORE_INDEX.

    Args:
        hidden: [B, T, D].
        weight: [V, D].
        targets: [B, T], aligned with `hidden` (not shifted here).
        chunk_size: tokens whose logits are computed at a time, to save memory; None: all.

    Returns:
        A scalar in fp32 (fp64 for fp64 input). For a mean divide by `valid_targets`, summed over ranks.
    """
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    if chunk_size is None or len(targets) <= chunk_size:
        return _summed(hidden, weight, targets)
    return _Chunked.apply(hidden, weight, targets, chunk_size)


class _Chunked(torch.autograd.Function):
    """The loss in chunks. Gradients are computed in the forward pass, while the logits of a chunk exist."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
        with_gradient = any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if with_gradient else None
        grad_weight = torch.zeros_like(weight) if with_gradient else None
        total = to_float32(hidden.new_zeros(()))
        for start in range(0, len(targets), chunk_size):
            rows = slice(start, start + chunk_size)
            h, target = hidden[rows], targets[rows]
            logp = to_float32(F.linear(h, weight)).log_softmax(-1)  # [chunk, V]
            total = total + F.nll_loss(logp, target, ignore_index=IGNORE_INDEX, reduction="sum")
            if grad_hidden is not None and grad_weight is not None:
                valid = target != IGNORE_INDEX
                gradient = logp.exp_().mul_(valid[:, None])
                place = torch.arange(len(target), device=target.device)
                gradient[place, target.clamp(min=0)] -= valid.to(gradient.dtype)
                narrow = gradient.to(weight.dtype)
                grad_hidden[rows] = narrow @ weight
                grad_weight.addmm_(narrow.T, h)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * upstream, grad_weight * upstream, None, None


def _summed(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = to_float32(F.linear(hidden, weight))
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")


def to_float32(x: Tensor) -> Tensor:
    """Return x in fp32; fp64 stays fp64."""
    return x if x.element_size() >= 4 else x.float()


def valid_targets(targets: Tensor) -> Tensor:
    """Return the number of targets that are not IGNORE_INDEX, as a scalar tensor."""
    return (targets != IGNORE_INDEX).sum()


def shift_labels(labels: Tensor) -> Tensor:
    """Return the targets [B, T] of labels [B, T] in the convention of transformers: target t is label t + 1."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
