"""The configuration of the architecture. Field names are those of the released config.json (arXiv 2502.05171)."""

import math
from dataclasses import dataclass
from typing import Literal

SamplingScheme = Literal["poisson-lognormal-filling", "fixed"]

Checkpointing = Literal["none", "step", "block"]

MAX_NUM_STEPS = 4096
"""Largest number of core iterations that an option accepts, so that a typing error does not block a machine."""

Kernels = Literal["auto", "triton", "torch"]
"""Implementation of the element-wise operations: `auto` is triton on a GPU (CUDA or ROCm) and torch elsewhere."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a recurrent-depth transformer and how many iterations it is trained for.

    Args:
        n_embd: width D.
        n_heads: attention heads H; the head size K = n_embd / n_heads must be even.
        intermediate_size: inner width of the gated MLP.
        n_layers_in_prelude, n_layers_in_recurrent_block, n_layers_in_coda: blocks of each part.
        vocab_size: rows V of the embedding.
        block_size: longest sequence the rotary table covers, in tokens.
        mean_recurrence: mean of the iterations sampled in training; the default number of iterations at test time.
        mean_backprop_depth: last iterations that carry gradient (k); null trains through all of them.
        sampling_scheme: `poisson-lognormal-filling` samples the depth, `fixed` always runs `mean_recurrence`.
        state_init: `like-init` draws a random initial state in training, `zero` starts from zeros.
        norm: name of the class of the norms in `recurrent_depth.model.layers.NORMS`.
        norm_eps: epsilon of the norms.
        rope_base: base of the rotary embedding.
        qk_bias: add a learned bias to queries and keys.
        tie_embeddings: use the embedding as output projection.
    """

    n_embd: int = 64
    n_heads: int = 4
    intermediate_size: int = 176
    n_layers_in_prelude: int = 1
    n_layers_in_recurrent_block: int = 1
    n_layers_in_coda: int = 1
    vocab_size: int = 512
    block_size: int = 128
    mean_recurrence: int = 8
    mean_backprop_depth: int | None = 4
    sampling_scheme: SamplingScheme = "poisson-lognormal-filling"
    state_init: Literal["like-init", "zero"] = "like-init"
    norm_eps: float = 1e-6
    rope_base: float = 50_000.0
    qk_bias: bool = True
    tie_embeddings: bool = True
    norm: Literal["rms", "layer"] = "rms"

    def __post_init__(self) -> None:
        for name in (
            "n_embd", "n_heads", "intermediate_size", "n_layers_in_prelude", "n_layers_in_recurrent_block",
            "n_layers_in_coda", "vocab_size", "block_size", "mean_recurrence", "mean_backprop_depth",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.mean_recurrence > MAX_NUM_STEPS:
            raise ValueError(
                f"mean_recurrence is {self.mean_recurrence}; it must be at most {MAX_NUM_STEPS} iterations"
            )
        if self.n_embd % self.n_heads or (self.n_embd // self.n_heads) % 2:
            raise ValueError(
                f"n_embd is {self.n_embd} and n_heads is {self.n_heads}; the head size n_embd / n_heads must be even "
                "(rotary embedding rotates pairs): change one of them"
            )
        if not 0 < self.norm_eps < math.inf:
            raise ValueError(f"norm_eps is {self.norm_eps}; it must be a finite number above 0")
        if not 1 < self.rope_base < math.inf:
            raise ValueError(f"rope_base is {self.rope_base}; it must be a finite number above 1")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_heads

    @property
    def effective_depth(self) -> int:
        """Number of layers at the mean depth; sets the scale of the output projections at initialisation."""
        return self.unrolled_layers(self.mean_recurrence)

    @property
    def init_std(self) -> float:
        """Standard deviation of weights and of the initial state before its scale: sqrt(2 / (5 D))."""
        return math.sqrt(2 / (5 * self.n_embd))

    @property
    def output_std(self) -> float:
        return self.init_std / math.sqrt(2 * self.effective_depth)

    @property
    def embed_scale(self) -> float:
        return math.sqrt(self.n_embd)

    @property
    def state_std(self) -> float:
        """Standard deviation of the initial state: the variance is 2/5 at any width."""
        return self.init_std * self.embed_scale

    def unrolled_layers(self, num_steps: int) -> int:
        core = self.n_layers_in_recurrent_block * num_steps
        return self.n_layers_in_prelude + core + self.n_layers_in_coda


SHAPES: dict[str, ModelConfig] = {
    "tiny": ModelConfig(),
    "small": ModelConfig(
        n_embd=768, n_heads=12, intermediate_size=2560, n_layers_in_prelude=2, n_layers_in_recurrent_block=4,
        n_layers_in_coda=2, vocab_size=32_768, block_size=2048, mean_recurrence=16, mean_backprop_depth=8,
    ),
    "huginn-3.5b": ModelConfig(
        n_embd=5280, n_heads=55, intermediate_size=17_920, n_layers_in_prelude=2, n_layers_in_recurrent_block=4,
        n_layers_in_coda=2, vocab_size=65_536, block_size=4096, mean_recurrence=32, mean_backprop_depth=8,
    ),
}  # fmt: skip
"""Named shapes: `tiny` trains on a CPU in minutes, `small` on one GPU, `huginn-3.5b` is the published model."""
