"""The model: prelude, recurrent core, coda (arXiv 2502.05171). The transformers class is in recurrent_depth/hf.

Shapes: B batch, T tokens, D width, R iterations, V vocabulary.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurrent_depth.model.attention import AttentionFunction, Rotary, attention_for
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.gate import Gate
from recurrent_depth.model.layers import make_block, make_norm, rotary_at, rotary_table
from recurrent_depth.model.loss import IGNORE_INDEX, linear_cross_entropy, shift_labels, to_float32, valid_targets
from recurrent_depth.model.random import named_generator
from recurrent_depth.model.recurrence import Adapt, NumSteps, OnStep, RecurrentCore, split_steps


class Transformer(nn.Module):
    """Everything below the head, shared by the training model and the transformers class."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_scale, self.ln_f_before_coda = config.embed_scale, config.ln_f_before_coda
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.prelude = nn.ModuleList(make_block(config) for _ in range(config.n_layers_in_prelude))
        self.adapter = nn.Linear(2 * config.n_embd, config.n_embd, bias=False)
        self.core_block = RecurrentCore(config)
        self.coda = nn.ModuleList(make_block(config) for _ in range(config.n_layers_in_coda))
        self.ln_f = make_norm(config)
        self.gate = None if config.gate is None else Gate(config.gate, config.n_embd)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the scaled embeddings [B, T, D] of input_ids [B, T]."""
        return self.wte(input_ids) * self.embed_scale

    def run_prelude(self, x: Tensor, rotary: Rotary, attention: AttentionFunction) -> Tensor:
        """Return the output e [B, T, D] of the prelude for embeddings [B, T, D]."""
        for layer_index, block in enumerate(self.prelude):
            x = block(x, rotary, attention, layer_index)
        return x

    def injection(self, e: Tensor) -> tuple[Tensor, Adapt]:
        """Return the injection of every core iteration, and the function that combines it with the state.

        adapter([s; e]) = s W_sᵀ + e W_eᵀ, and e does not change, so the second product is computed once. An adapter
        that was replaced, wrapped or quantised (LoRA, torchao, hooks) is called with the concatenation, so that its own
        forward runs.
        """
        if not _computes_a_plain_product(self.adapter):
            return e, self._concatenate
        state_weight, input_weight = self.adapter.weight.split(e.shape[-1], dim=1)
        return F.linear(e, input_weight), lambda state, injected: F.linear(state, state_weight) + injected

    def _concatenate(self, state: Tensor, e: Tensor) -> Tensor:
        return self.adapter(torch.cat([state, e], dim=-1))

    def iterate(
        self,
        state: Tensor,
        e: Tensor,
        num_steps: NumSteps,
        rotary: Rotary,
        attention: AttentionFunction,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Return `state` [B, T, D] after `num_steps` iterations of the core."""
        injected, adapt = self.injection(e)
        return self.core_block(state, injected, adapt, num_steps, rotary, attention, on_step)

    def coda_input(self, state: Tensor) -> Tensor:
        """Return what the coda reads from a state [B, T, D]: ln_f(state), or the state itself in retrofitted models."""
        return self.ln_f(state) if self.ln_f_before_coda else state

    def run_coda(self, state: Tensor, rotary: Rotary, attention: AttentionFunction) -> Tensor:
        """Return the hidden states [B, T, D] for the head."""
        x = self.coda_input(state)
        for offset, block in enumerate(self.coda):
            x = block(x, rotary, attention, len(self.prelude) + offset)
        return self.ln_f(x)


def _computes_a_plain_product(linear: nn.Module) -> bool:
    """Return whether the module computes x Wᵀ and nothing else. Subclasses count as something else."""
    if type(linear) is not nn.Linear or linear.bias is not None or "forward" in vars(linear):
        return False
    return not linear._forward_hooks and not linear._forward_pre_hooks and _is_plain(linear.weight)


def _is_plain(weight: Tensor) -> bool:
    """Return whether a tensor is a plain one; quantised weights are subclasses that may not support slicing."""
    if type(weight) in (Tensor, nn.Parameter):
        return True
    from torch.distributed.tensor import DTensor  # imported here because it takes 0.2 s

    return type(weight) is DTensor and _is_plain(weight.to_local())


@dataclass
class ModelOutput:
    """The output of a forward pass.

    Attributes:
        logits: [B, T, V] in fp32; None with `targets`.
        loss: mean over valid labels (`labels`), or sum over valid targets (`targets`); None without either.
        state: s_R [B, T, D], before ln_f.
        states: with return_states, the state after every iteration: R tensors [B, T, D].
    """

    logits: Tensor | None
    loss: Tensor | None
    state: Tensor
    states: list[Tensor] | None = None


@dataclass
class GradientStates:
    """The states of a forward pass that carry gradient, and what an objective reads them with.

    Attributes:
        states: the state before the first iteration with gradient, then those after each of the K, [B, T, D].
        hidden: runs the coda on a state; returns the hidden states [B, T, D] for the head.
        head: weight [V, D].
        gate: the exit gate, if the model has one.
        targets: [B, T], aligned; IGNORE_INDEX has no loss.
        loss_chunk_size: tokens whose logits are computed at a time; None: all.
    """

    states: list[Tensor]
    hidden: Callable[[Tensor], Tensor]
    head: Tensor
    gate: Gate | None
    targets: Tensor
    loss_chunk_size: int | None = None


Objective = Callable[[GradientStates], Tensor]
"""Returns the loss of a forward pass, summed over its valid targets (recurrent_depth/training/objective.py)."""


class RecurrentDepthModel(nn.Module):
    """A recurrent-depth transformer with its language-model head."""

    freqs_cis: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        self.register_buffer("freqs_cis", rotary_table(config))

    @property
    def model_config(self) -> ModelConfig:
        """The configuration; the transformers class has this property too."""
        return self.config

    def forward(
        self,
        input_ids: Tensor,
        *,
        num_steps: NumSteps | None = None,
        input_states: Tensor | None = None,
        labels: Tensor | None = None,
        targets: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        return_states: bool = False,
        loss_chunk_size: int | None = None,
        objective: Objective | None = None,
    ) -> ModelOutput:
        """Run the model.

        Args:
            input_ids: [B, T].
            num_steps: core iterations, an int, or (without, with) gradient; default: the config's mean_recurrence.
            input_states: initial state [B, T, D]; default zeros.
            labels: [B, T], shifted here; the loss is the mean over those that are not IGNORE_INDEX.
            targets: [B, T], already aligned; the loss is the sum over those that are not IGNORE_INDEX, and no logits
                are returned.
            attention_mask: [B, T], nonzero where a token is real.
            position_ids: [B or 1, T]; default: 0, 1, ..., counted over real tokens if there is a mask.
            document_ids: [B, T]; tokens see only their own document.
            return_states: return the state after every iteration.
            loss_chunk_size: with `targets`, tokens whose logits are computed at a time.
            objective: with `targets`, computes the loss from the states with gradient; default: the cross-entropy
                after the last iteration.
        """
        if input_ids.shape[1] > self.config.block_size and position_ids is None:
            raise ValueError(
                f"{input_ids.shape[1]} tokens exceed model.block_size {self.config.block_size}; "
                "shorten the input or use a model with a longer block_size"
            )
        rotary = rotary_at(self.freqs_cis, self._positions(input_ids, attention_mask, position_ids))
        attention = attention_for(input_ids.shape[1], attention_mask=attention_mask, document_ids=document_ids)
        e = self.transformer.run_prelude(self.transformer.embed(input_ids), rotary, attention)
        state = torch.zeros_like(e) if input_states is None else input_states.to(e.dtype)
        steps = self.config.mean_recurrence if num_steps is None else num_steps
        states: list[Tensor] | None = [] if return_states else None
        record = None if states is None else lambda step, s: states.append(s)
        if objective is not None and targets is not None:
            last = deque([state], maxlen=split_steps(steps)[1] + 1)
            state = self.transformer.iterate(state, e, steps, rotary, attention, lambda step, s: last.append(s))
            read = partial(self.transformer.run_coda, rotary=rotary, attention=attention)
            given = GradientStates(
                list(last), read, self.lm_head.weight, self.transformer.gate, targets, loss_chunk_size
            )
            return ModelOutput(None, objective(given), state)
        state = self.transformer.iterate(state, e, steps, rotary, attention, record)
        hidden = self.transformer.run_coda(state, rotary, attention)
        if targets is not None:
            loss = linear_cross_entropy(hidden, self.lm_head.weight, targets, loss_chunk_size)
            return ModelOutput(None, loss, state, states)
        logits = to_float32(self.lm_head(hidden))
        return ModelOutput(logits, _labels_loss(logits, labels), state, states)

    @staticmethod
    def _positions(input_ids: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        if position_ids is not None:
            return position_ids
        if mask is not None:
            return (mask.long().cumsum(-1) - 1).clamp(min=0)
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None]

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Initialise every weight from (seed, its name), so that sharded and whole models start equal."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, self.config, seed))

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


def is_norm(name: str) -> bool:
    """Return whether a parameter belongs to a norm."""
    return "norm" in name or "ln_f" in name


def is_gate(name: str) -> bool:
    """Return whether a parameter belongs to the exit gate."""
    return name.startswith("transformer.gate.")


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """Return the initial value of one whole parameter, on the CPU in fp32 (arXiv 2502.05171, section 4.2)."""
    if is_norm(name):
        return torch.ones(shape, device="cpu")
    if is_gate(name):
        bias = config.gate.bias if config.gate is not None and name.endswith("bias") else 0
        return torch.full(shape, float(bias), device="cpu")
    if name.endswith("bias"):
        return torch.zeros(shape, device="cpu")
    std = config.output_std if name.endswith("proj.weight") else config.init_std
    generator = named_generator(seed, name)

    def draw() -> Tensor:
        return torch.empty(shape, device="cpu").normal_(std=std, generator=generator)

    value = draw()
    # Truncated as by nn.init.trunc_normal_ of torch 2.13, which draws other numbers in other versions.
    while (outside := value.abs() > 3 * std).any():
        value = torch.where(outside, draw(), value)
    return value


def _labels_loss(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    if labels is None:
        return None
    targets = shift_labels(labels)
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total / valid_targets(targets).clamp(min=1)
