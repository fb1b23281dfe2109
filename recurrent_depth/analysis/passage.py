"""One window of tokens in a model: prelude, core iterations from any state, coda and head.

It uses the parts of the model that every model of the family has, and not how their blocks are made.

Shapes: T tokens, D width, V vocabulary; the batch has one row.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recurrent_depth.generation.request import DecodableModel
from recurrent_depth.model.attention import AttentionFunction, causal
from recurrent_depth.model.layers import rotary_at
from recurrent_depth.model.loss import to_float32
from recurrent_depth.model.recurrence import random_state

OnState = Callable[[int, Tensor], Any]
"""Called with (iterations done, state [T, D]) after every iteration."""


class Passage:
    """A window of tokens with its prelude computed.

    Args:
        model: a model of the training class or the transformers class.
        ids: token ids.
        attention: attention function of every block.
    """

    def __init__(self, model: DecodableModel, ids: Sequence[int], attention: AttentionFunction = causal) -> None:
        self.model, self.attention = model, attention
        device = model.lm_head.weight.device
        input_ids = torch.tensor([ids], device=device)
        self.positions = torch.arange(len(ids), device=device)[None]
        self.rotary = rotary_at(model.freqs_cis, self.positions)
        embedded = model.transformer.embed(input_ids)
        self.e = model.transformer.run_prelude(embedded, self.rotary, attention)  # [1, T, D]

    def zero_state(self) -> Tensor:
        """Return the initial state of generation and evaluation, [T, D]."""
        return torch.zeros_like(self.e[0])

    def random_state(self, seed: int) -> Tensor:
        """Return a random initial state as in training, [T, D]."""
        rows = torch.zeros(1, dtype=torch.long, device=self.e.device)
        return random_state(self.model.model_config, rows, self.positions, seed=seed)[0].to(self.e.dtype)

    def iterate(self, state: Tensor, num_steps: int, on_state: OnState | None = None) -> Tensor:
        """Return the state [T, D] after `num_steps` iterations."""

        def on_step(step: int, reached: Tensor) -> None:
            if on_state is not None:
                on_state(step, reached[0])

        core = self.model.transformer.iterate
        return core(state[None], self.e, num_steps, self.rotary, self.attention, on_step)[0]

    def hidden(self, state: Tensor) -> Tensor:
        """Return the output of the coda [T, D], which the head reads."""
        return self.model.transformer.run_coda(state[None], self.rotary, self.attention)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [tokens, V] in fp32 (fp64 for a model in fp64) of some rows of `hidden`."""
        return to_float32(self.model.lm_head(hidden))
