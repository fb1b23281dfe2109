"""Attention in plain operations: it shows its probabilities, and it has forward-mode derivatives.

Shapes: H heads, K head size, T tokens.
"""

import math

import torch
from torch import Tensor

from recurrent_depth.model.attention import AttentionFunction, on_heads


def plain_attention(maps: dict[int, Tensor] | None = None) -> AttentionFunction:
    """Return causal attention without fused kernels.

    Args:
        maps: receives the probabilities [H, T, T] of the last call by layer index, for a batch of one row.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, layer_index: int) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        probabilities = scores.masked_fill(later, -torch.inf).softmax(-1)
        if maps is not None:
            maps[layer_index] = probabilities[0]
        return probabilities @ v

    return on_heads(attend)
