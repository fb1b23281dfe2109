"""FLOPs of a model in closed form: matrix products only, two per multiply-add.

All counts are per sequence of T tokens. Attention is counted either causal (the operations needed) or full (as torch's
counter reports); MFU uses the causal count without recomputation, HFU includes recomputation.
"""

import re
from functools import lru_cache
from typing import Literal

from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.recurrence import sample_depth

Recompute = Literal["none", "step", "block"]

PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "MI250X": 191.5e12,  # per die
    "MI300X": 1307e12,
}
"""Dense bf16 peak by the vendors' data sheets, operations per second; H100 and H200 are the SXM modules."""

_SLOWER = re.compile(r"PCIe|NVL", re.IGNORECASE)  # H100 and H200 cards with a lower peak than the SXM modules


def peak_of(device: str) -> float | None:
    """Return the dense bf16 peak of a GPU in operations per second, by its full name; None if it is not known."""
    for name, peak in PEAK_FLOPS.items():
        if re.search(rf"\b{name}\b", device) and not (name[0] == "H" and _SLOWER.search(device)):
            return peak
    return None


def attention_flops(config: ModelConfig, tokens: int, causal: bool = True) -> int:
    """Return the FLOPs of scores and weighted values of one layer."""
    pairs = tokens * (tokens + 1) // 2 if causal else tokens * tokens
    return 4 * pairs * config.n_heads * config.head_dim


def block_flops(config: ModelConfig, tokens: int, causal: bool = True) -> int:
    """Return the forward FLOPs of one block."""
    heads = 2 * config.n_heads + 2 * config.kv_heads  # of q, k, v and of the output
    products = config.n_embd * (heads * config.head_dim + 3 * config.intermediate_size)
    return 2 * tokens * products + attention_flops(config, tokens, causal)


def iteration_flops(config: ModelConfig, tokens: int, causal: bool = True) -> int:
    """Return the forward FLOPs of one core iteration: the core blocks, and the half of the adapter for the state."""
    return 2 * tokens * config.n_embd**2 + config.n_layers_in_recurrent_block * block_flops(config, tokens, causal)


def head_flops(config: ModelConfig, tokens: int) -> int:
    """Return the forward FLOPs of the head."""
    return 2 * tokens * config.n_embd * config.vocab_size


def read_flops(config: ModelConfig, tokens: int, causal: bool = True) -> int:
    """Return the forward FLOPs of reading a state: coda and head."""
    return config.n_layers_in_coda * block_flops(config, tokens, causal) + head_flops(config, tokens)


def outer_flops(config: ModelConfig, tokens: int, causal: bool = True) -> int:
    """Return the forward FLOPs outside the loop: prelude, coda, head, and the half of the adapter for the input."""
    prelude = config.n_layers_in_prelude * block_flops(config, tokens, causal)
    return prelude + 2 * tokens * config.n_embd**2 + read_flops(config, tokens, causal)


def forward_flops(config: ModelConfig, tokens: int, num_steps: int, causal: bool = True) -> int:
    """Return the FLOPs of a forward pass."""
    return outer_flops(config, tokens, causal) + num_steps * iteration_flops(config, tokens, causal)


def training_flops(
    config: ModelConfig,
    tokens: int,
    without: int,
    with_gradient: int,
    recompute: Recompute = "none",
    causal: bool = True,
) -> int:
    """Return the forward and backward FLOPs of a micro-step.

    A backward pass computes two products for each product of the forward pass (the scores that flash attention
    recomputes are not counted). The state before the first iteration with gradient needs no gradient itself.

    Args:
        without: iterations without gradient.
        with_gradient: iterations with gradient.
    """
    forward = forward_flops(config, tokens, without + with_gradient, causal)
    differentiated = forward_flops(config, tokens, with_gradient, causal)
    backward = 2 * differentiated - 2 * tokens * config.n_embd**2
    again = 0
    if recompute == "step":
        again = with_gradient * iteration_flops(config, tokens, causal)
    elif recompute == "block":
        again = with_gradient * config.n_layers_in_recurrent_block * block_flops(config, tokens, causal)
    return forward + backward + again


@lru_cache
def sampled_depths(config: ModelConfig, draws: int, seed: int = 0) -> tuple[tuple[int, int], ...]:
    """Return the sampled depths of the first micro-step of `draws` training steps."""
    return tuple(sample_depth(config, seed=seed, step=step, micro_step=0) for step in range(draws))


@lru_cache
def mean_training_flops(config: ModelConfig, tokens: int, recompute: Recompute = "none", draws: int = 4096) -> float:
    """Return the mean of `training_flops` over `draws` sampled depths."""
    depths = sampled_depths(config, draws)
    return sum(training_flops(config, tokens, n, k, recompute) for n, k in depths) / draws
