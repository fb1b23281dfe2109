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
class RopeScaling:
    """How rotary frequencies are changed for sequences longer than a dense model was first trained on.

    Names and formulas are those of `rope_scaling` in transformers (modeling_rope_utils).

    Args:
        rope_type: `linear` divides all frequencies by factor; `llama3` only low ones; `yarn` blends by frequency and
            scales cos and sin.
        factor: how many times longer the new sequences are.
        original_max_position_embeddings: sequence length before, in tokens; for llama3 and yarn.
        low_freq_factor, high_freq_factor: for llama3: rotations within the original length between which frequencies
            are blended.
        beta_fast, beta_slow: the same for yarn.
        attention_factor: for yarn: factor of cos and sin; null: 0.1 ln(factor) + 1.
    """

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"factor is {self.factor}; it must be a finite number of at least 1")
        if self.rope_type != "linear" and (self.original_max_position_embeddings or 0) < 1:
            raise ValueError(
                f"original_max_position_embeddings is {self.original_max_position_embeddings}; {self.rope_type} needs "
                "the sequence length before scaling, in tokens"
            )
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor is {self.high_freq_factor}; it must be above low_freq_factor, {self.low_freq_factor}"
            )
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast is {self.beta_fast}; it must be above beta_slow, {self.beta_slow}")


@dataclass(frozen=True)
class GateConfig:
    """An exit gate, which learns after how many iterations a token can stop (docs/stopping.md).

    Args:
        input: what the gate reads: `state`, or `state_and_change`, the state and its change in the last iteration.
        bias: initial logit of the probability to stop after an iteration; 0 is one half, -3 is 5%.
    """

    input: Literal["state", "state_and_change"] = "state"
    bias: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.bias):
            raise ValueError(f"bias is {self.bias}; it must be a finite number")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a recurrent-depth transformer and how many iterations it is trained for.

    The defaults are Huginn's architecture. The fields from `n_kv_heads` on describe other members of the family:
    released retrofits and converted dense models (docs/conversion.md).

    Args:
        n_embd: width D.
        n_heads: attention heads H; the head size K must be even.
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
        block: where a block has its norms: `sandwich` before each part and after its sum, `pre` before each part
            (Llama, Qwen), `branch` after each part, before its sum (OLMo-2).
        ln_f_before_coda: apply the last norm to the state before the coda too, not only after it.
        n_kv_heads: heads of keys and values, a divisor of n_heads (grouped-query attention); null: n_heads.
        head_size: head size K; null: n_embd / n_heads.
        qkv_bias: add a bias to the projection to queries, keys and values.
        qk_norm: RMS norm of queries and keys before the rotation: `head` of each head, `full` of all heads together.
        rotary_scaling: scaling of the rotary frequencies; null: none.
        embed_multiplier: factor of the embeddings; null: sqrt(n_embd).
        initial_state_std: standard deviation of a random initial state; null: sqrt(2/5).
        gate: a learned exit gate; null: none.
        core_norm: norm of the core blocks, as `norm`; null: that of the other blocks.
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
    block: Literal["sandwich", "pre", "branch"] = "sandwich"
    ln_f_before_coda: bool = True
    n_kv_heads: int | None = None
    head_size: int | None = None
    qkv_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    rotary_scaling: RopeScaling | None = None
    embed_multiplier: float | None = None
    initial_state_std: float | None = None
    gate: GateConfig | None = None
    core_norm: Literal["rms", "layer"] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rotary_scaling, dict):  # as config.json and checkpoint.json hold it
            object.__setattr__(self, "rotary_scaling", RopeScaling(**self.rotary_scaling))
        if isinstance(self.gate, dict):
            object.__setattr__(self, "gate", GateConfig(**self.gate))
        for name in (
            "n_embd", "n_heads", "intermediate_size", "n_layers_in_prelude", "n_layers_in_recurrent_block",
            "n_layers_in_coda", "vocab_size", "block_size", "mean_recurrence", "mean_backprop_depth", "n_kv_heads",
            "head_size",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.mean_recurrence > MAX_NUM_STEPS:
            raise ValueError(
                f"mean_recurrence is {self.mean_recurrence}; it must be at most {MAX_NUM_STEPS} iterations"
            )
        self._check_heads()
        for name, low in (("norm_eps", 0), ("rope_base", 1), ("embed_multiplier", 0)):
            value = getattr(self, name)
            if value is not None and not low < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be a finite number above {low}")
        if self.initial_state_std is not None and not 0 <= self.initial_state_std < math.inf:
            raise ValueError(f"initial_state_std is {self.initial_state_std}; it must be a finite number of at least 0")

    def _check_heads(self) -> None:
        if (self.head_size is None and self.n_embd % self.n_heads) or self.head_dim % 2:
            raise ValueError(
                f"n_embd is {self.n_embd} and n_heads is {self.n_heads}; the head size (head_size, or n_embd / n_heads)"
                " must be even, because the rotary embedding rotates pairs: change one of them"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_kv_heads is {self.n_kv_heads}; it must divide n_heads, which is {self.n_heads}")
        if self.qk_bias and self.kv_heads != self.n_heads:
            raise ValueError(
                f"n_kv_heads is {self.n_kv_heads} and qk_bias is true; qk_bias holds one bias per head for both, so "
                "set qk_bias to false (qkv_bias works with grouped heads)"
            )
        if self.qk_bias and self.qk_norm != "none":
            raise ValueError(f"qk_norm is {self.qk_norm!r} and qk_bias is true; set one of them to none or false")

    @property
    def head_dim(self) -> int:
        """Head size K."""
        return self.head_size or self.n_embd // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values G."""
        return self.n_kv_heads or self.n_heads

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
        """Factor of the embeddings."""
        return math.sqrt(self.n_embd) if self.embed_multiplier is None else self.embed_multiplier

    @property
    def state_std(self) -> float:
        """Standard deviation of the initial state: by default the variance is 2/5 at any width."""
        default = self.init_std * math.sqrt(self.n_embd)
        return default if self.initial_state_std is None else self.initial_state_std

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
    "smollm2-135m-10-10-10": ModelConfig(
        n_embd=576, n_heads=9, intermediate_size=1536, n_layers_in_prelude=10, n_layers_in_recurrent_block=10,
        n_layers_in_coda=10, vocab_size=49_152, block_size=8192, mean_recurrence=4, mean_backprop_depth=4,
        state_init="zero", norm_eps=1e-5, rope_base=100_000.0, qk_bias=False, block="pre", ln_f_before_coda=False,
        n_kv_heads=3, embed_multiplier=1.0, initial_state_std=0.0087039,
    ),
}  # fmt: skip
"""Named shapes: `tiny` trains on a CPU in minutes, `small` on one GPU, `huginn-3.5b` is the published model, and
`smollm2-135m-10-10-10` a converted one (docs/conversion.md)."""
