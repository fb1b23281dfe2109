"""Rotary frequencies for sequences longer than a dense model was first trained on: linear, llama3 and YaRN scaling."""

import math

import torch
from torch import Tensor

from recurrent_depth.model.config import RopeScaling


def scaled_frequencies(frequencies: Tensor, base: float, scaling: RopeScaling) -> tuple[Tensor, float]:
    """Return the scaled frequencies [K/2], and the factor of cos and sin.

    The formulas are those of transformers (modeling_rope_utils).

    Args:
        frequencies: [K/2], base**(-2 i / K).
        base: base of the rotary embedding.
    """
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor, 1.0
    length = scaling.original_max_position_embeddings
    assert length is not None
    if scaling.rope_type == "llama3":
        return _llama3(frequencies, length, scaling), 1.0
    scale = scaling.attention_factor
    return _yarn(frequencies, base, length, scaling), 0.1 * math.log(scaling.factor) + 1 if scale is None else scale


def _llama3(frequencies: Tensor, length: int, scaling: RopeScaling) -> Tensor:
    """Divide low frequencies by the factor, keep high ones, and blend those between by their rotations in `length`."""
    rotations = length * frequencies / (2 * math.pi)
    kept = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(frequencies: Tensor, base: float, length: int, scaling: RopeScaling) -> Tensor:
    """Blend divided and kept frequencies by the index of the channel pair (arXiv 2309.00071)."""
    pairs = len(frequencies)

    def pair_of(rotations: float) -> float:
        """Return the (fractional) pair that makes this many rotations in `length` tokens."""
        return pairs * math.log(length / (rotations * 2 * math.pi)) / math.log(base)

    low, high = (
        max(math.floor(pair_of(scaling.beta_fast)), 0),
        min(math.ceil(pair_of(scaling.beta_slow)), 2 * pairs - 1),
    )
    index = torch.arange(pairs, dtype=torch.float32, device=frequencies.device)
    divided = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    return divided * frequencies / scaling.factor + (1 - divided) * frequencies
