"""The loop over the core blocks, the sampling of its depth, and the initial state.

Shapes: B batch, T tokens, D width, R iterations.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recurrent_depth.model.attention import AttentionFunction, Rotary
from recurrent_depth.model.config import Checkpointing, ModelConfig
from recurrent_depth.model.layers import make_block
from recurrent_depth.model.ops import TORCH_OPS, Ops
from recurrent_depth.model.random import DEPTH_STREAM, generator

NumSteps = int | tuple[int, int]
"""Core iterations: an int (all carry gradient), or (iterations without gradient, iterations with)."""

Adapt = Callable[[Tensor, Tensor], Tensor]
"""(state [B, T, D], injection [B, T, D]) -> input of the first core block [B, T, D]"""

OnStep = Callable[[int, Tensor], bool | None]
"""Called with (iterations done, state) after every iteration; returning True ends the loop."""


DEPTH_SIGMA = 0.5


def split_steps(num_steps: NumSteps) -> tuple[int, int]:
    """Return the iterations (without gradient, with gradient) of `num_steps`, checked."""
    without, with_gradient = (0, num_steps) if isinstance(num_steps, int) else num_steps
    if without < 0 or with_gradient < 0 or without + with_gradient < 1:
        raise ValueError(
            f"num_steps is {num_steps}; it must be at least 1 (or a pair of counts with a sum of at least 1)"
        )
    return without, with_gradient


def sample_depth(config: ModelConfig, *, seed: int, step: int, micro_step: int) -> tuple[int, int]:
    """Return the iterations (without gradient, with gradient) of a micro-step. They are the same on all ranks.

    Log-normal Poisson distribution (arXiv 2502.05171, section 3.3): tau ~ Normal(log m - sigma²/2, sigma) with
    m = max(mean, k), r ~ Poisson(exp tau) + 1; the last k iterations carry gradient.
    """
    mean = config.mean_recurrence
    k = config.mean_backprop_depth
    if config.sampling_scheme == "fixed":
        total = mean
    else:
        rng = generator(seed, DEPTH_STREAM, step, micro_step)
        center = math.log(max(mean, k or 1)) - DEPTH_SIGMA**2 / 2
        total = int(rng.poisson(math.exp(rng.normal(center, DEPTH_SIGMA)))) + 1
    with_gradient = total if k is None else min(k, total)
    return total - with_gradient, with_gradient


def random_state(
    config: ModelConfig, rows: Tensor, positions: Tensor, *, seed: int, step: int = 0, ops: Ops = TORCH_OPS
) -> Tensor:
    """Return an initial state [B, T, D] in fp32, a function of (seed, step, row, position, channel).

    Its standard deviation is config.state_std. At test time pass row 0 for every row, so that the state depends neither
    on the batch nor on its padding.

    Args:
        rows: [B].
        positions: [B or 1, T].
    """
    return ops.truncated_normal(rows, positions, config.n_embd, seed=seed, step=step) * config.state_std


class RecurrentCore(nn.Sequential):
    """The core blocks and the loop over them, in one module, so that sharding gathers its weights once for the loop.

    An nn.Sequential, because FSDP of torch 2.11 refuses an nn.ModuleList even if it has a forward method.
    `activation_checkpointing` recomputes whole iterations or single blocks in the backward pass.
    """

    def __init__(self, config: ModelConfig) -> None:
        block = replace(config, norm=config.core_norm or config.norm)
        super().__init__(*(make_block(block) for _ in range(config.n_layers_in_recurrent_block)))
        self.first_layer = config.n_layers_in_prelude + config.n_layers_in_coda  # layer indices before the core's
        self.ops = TORCH_OPS
        self.activation_checkpointing: Checkpointing = "none"

    def forward(  # type: ignore[override]
        self,
        state: Tensor,
        injection: Tensor,
        adapt: Adapt,
        num_steps: NumSteps,
        rotary: Rotary,
        attention: AttentionFunction,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Run the loop and return the last state [B, T, D].

        Memory does not grow with the number of iterations without gradient.

        Args:
            state: initial state [B, T, D].
            injection: [B, T, D], added to the state at every iteration by `adapt`.
            on_step: called after every iteration (see `OnStep`).
        """
        without, with_gradient = split_steps(num_steps)
        for iteration in range(without + with_gradient):
            with torch.set_grad_enabled(torch.is_grad_enabled() and iteration >= without):
                state = self._checkpointed_step(state, injection, adapt, rotary, attention, iteration)
            if on_step is not None and on_step(iteration + 1, state):
                break
        return state

    def _checkpointed_step(self, state: Tensor, *args: Any) -> Tensor:
        if self.activation_checkpointing == "step" and torch.is_grad_enabled():
            return checkpoint(self.step, state, *args, use_reentrant=False)
        return self.step(state, *args)

    def step(
        self,
        state: Tensor,
        injection: Tensor,
        adapt: Adapt,
        rotary: Rotary,
        attention: AttentionFunction,
        iteration: int,
    ) -> Tensor:
        """Return the state [B, T, D] after iteration `iteration`, counted from 0: s_{i+1} = core(adapter([s_i; e]))."""
        x = adapt(state, injection)
        for layer_index, block in enumerate(self, start=self.first_layer + iteration * len(self)):
            if self.activation_checkpointing == "block" and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, attention, layer_index, use_reentrant=False)
            else:
                x = block(x, rotary, attention, layer_index)
        return x
