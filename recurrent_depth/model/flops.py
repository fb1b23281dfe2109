"""Floating-point operations of a model in closed form: matrix products only, two per multiply-add.

Per sequence of T tokens. Attention is counted either causal (what must be computed) or full (what torch's counter
reports); MFU uses the causal count and leaves recomputation out, HFU includes it.
"""

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
"""Dense bf16 peak by the vendors' data sheets, operations per second."""


def attention_flops(config: ModelConfig, tokens: int, causal: bool = True) -> int:
    """Scores and weighted values of one layer over a sequence."""
    pairs = tokens * (tokens + 1) // 2 if causal else tokens * tokens
    return 4 * pairs * config.n_embd


def block_flops(config: ModelConfig, tokens: int, causal: bool = True) -> int:
    """One block, forward."""
    projections = 8 * config.n_embd**2 + 6 * config.n_embd * config.intermediate_size
    return tokens * projections + attention_flops(config, tokens, causal)


def step_flops(config: ModelConfig, tokens: int, causal: bool = True) -> int:
    """One step of the core, forward: the state's half of the adapter and the core blocks."""
    return 2 * tokens * config.n_embd**2 + config.n_layers_in_recurrent_block * block_flops(config, tokens, causal)


def outer_flops(config: ModelConfig, tokens: int, causal: bool = True) -> int:
    """Forward of everything outside the loop: prelude, coda, the input's half of the adapter, the head."""
    outer = config.n_layers_in_prelude + config.n_layers_in_coda
    linear = 2 * tokens * config.n_embd * (config.n_embd + config.vocab_size)
    return outer * block_flops(config, tokens, causal) + linear


def forward_flops(config: ModelConfig, tokens: int, num_steps: int, causal: bool = True) -> int:
    """A forward pass."""
    return outer_flops(config, tokens, causal) + num_steps * step_flops(config, tokens, causal)


def training_flops(
    config: ModelConfig,
    tokens: int,
    without: int,
    with_gradient: int,
    recompute: Recompute = "none",
    causal: bool = True,
) -> int:
    """Forward and backward of a micro-step: `without` steps carry no gradient, `with_gradient` do.

    A backward pass makes two products for each of the forward's (that flash attention makes its scores again is not
    counted). The state that enters the first step with gradient needs none itself.
    """
    forward = forward_flops(config, tokens, without + with_gradient, causal)
    differentiated = forward_flops(config, tokens, with_gradient, causal)
    backward = 2 * differentiated - 2 * tokens * config.n_embd**2
    again = 0
    if recompute == "step":
        again = with_gradient * step_flops(config, tokens, causal)
    elif recompute == "block":
        again = with_gradient * config.n_layers_in_recurrent_block * block_flops(config, tokens, causal)
    return forward + backward + again


@lru_cache
def mean_training_flops(config: ModelConfig, tokens: int, recompute: Recompute = "none", draws: int = 4096) -> float:
    """Mean of `training_flops` over the sampled depths."""
    depths = [sample_depth(config, seed=0, step=step, micro_step=0) for step in range(draws)]
    return sum(training_flops(config, tokens, n, k, recompute) for n, k in depths) / draws
