"""config.json of a recurrent-depth model, in the released Huginn format."""

import math
from dataclasses import asdict, fields
from typing import Any

from transformers import PreTrainedConfig

from recurrent_depth.model.config import ModelConfig

_FIXED = {
    "architecture_class_name": "RecurrentGPT",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "injection_type": "linear",
    "init_strategy": "takase",
    "bias": False,
    "test_time_noise": 0,
}
"""Fields of a released config.json that select parts of the architecture, with the only values implemented here."""

_DERIVED = (
    "n_layers",
    "num_hidden_layers",
    "effective_expected_depth",
    "padded_vocab_size",
    "padding_multiple",
    "activation_checkpoint_impl",
    "init_orthogonal",
    "test_time_noise_type",
)
"""Fields of a released config.json that follow from others or have no effect on a loaded model."""

_NORMS = {"RMSNorm_llama": "rms", "LayerNorm": "layer"}
"""Value of the released field norm_class_name -> value of `ModelConfig.norm`."""

_BLOCKS = {"SandwichBlock": "sandwich", "PreNormBlock": "pre", "BranchNormBlock": "branch"}
"""Value of the released field block_class_name -> value of `ModelConfig.block`."""

_SPELLINGS = {"num_attention_heads": "n_heads", "tie_word_embeddings": "tie_embeddings"}

_RELEASED_AS = ("n_kv_heads", "head_size", "embed_multiplier", "initial_state_std")
"""Fields of `ModelConfig` that config.json stores as num_key_value_heads, head_dim and init_values, like the released
ones."""

_FAMILY = ("ln_f_before_coda", "qkv_bias", "qk_norm", "rotary_scaling", "gate", "core_norm")
"""Fields of `ModelConfig` that config.json has only if they differ from Huginn's architecture."""


def _read_released(kwargs: dict[str, Any]) -> None:
    """Replace released fields by those of `ModelConfig` where they differ from what Huginn's architecture implies."""
    c = ModelConfig(n_embd=kwargs.get("n_embd", ModelConfig.n_embd), n_heads=1)
    heads = kwargs.get("n_heads", ModelConfig.n_heads)
    kv_heads, head_dim = kwargs.pop("num_key_value_heads", None), kwargs.pop("head_dim", None)
    if kv_heads not in (None, heads):
        kwargs.setdefault("n_kv_heads", kv_heads)
    if head_dim is not None and head_dim * heads != c.n_embd:
        kwargs.setdefault("head_size", head_dim)
    values = kwargs.pop("init_values", None) or {}
    if "embed_scale" in values and not math.isclose(values["embed_scale"], c.embed_scale, rel_tol=1e-3):
        kwargs.setdefault("embed_multiplier", values["embed_scale"])
    if "embed_scale" in values and "std" in values:
        std = values["std"] * values["embed_scale"]
        if not math.isclose(std, c.state_std, rel_tol=1e-3):
            kwargs.setdefault("initial_state_std", std)


class RecurrentDepthConfig(PreTrainedConfig):
    """Fields of `ModelConfig`, and defaults of a forward pass.

    Args:
        num_steps: core iterations, also in training; null: mean_recurrence, and sampled depths in training.
        state_seed: seed of a random initial state, a function of (seed, position, channel); null: zeros.
    """

    model_type = "huginn_raven"
    attribute_map = {  # noqa: RUF012 (the name and form are transformers')
        "hidden_size": "n_embd",
        "max_position_embeddings": "block_size",
        "num_attention_heads": "n_heads",
    }
    keys_to_ignore_at_inference = ["cache", "past_key_values", "last_state", "latent_states"]  # noqa: RUF012

    def __init__(self, num_steps: int | None = None, state_seed: int | None = None, **kwargs: Any) -> None:
        if "rope_theta" in kwargs or "rope_parameters" in kwargs:
            raise ValueError(
                "config.json has rope_theta: this is a retrofitted model (arXiv 2511.07384) in its released format; "
                "load it with recurrent_depth.hf.loading.load_model, or write a folder for transformers with "
                "`recurrent-depth export --model FOLDER --out OTHER_FOLDER`"
            )
        for name, implemented in _FIXED.items():
            value = kwargs.pop(name, implemented)
            if value != implemented:
                raise ValueError(f"config.json has {name}: {value!r}; only {implemented!r} is implemented")
        for name, class_name, known in (("norm", "norm_class_name", _NORMS), ("block", "block_class_name", _BLOCKS)):
            value = kwargs.pop(class_name, next(iter(known)))
            if value not in known:
                raise ValueError(f"config.json has {class_name}: {value!r}; implemented are {', '.join(known)}")
            kwargs.setdefault(name, known[value])
        for name in _DERIVED:
            kwargs.pop(name, None)
        for spelling, name in _SPELLINGS.items():
            if spelling in kwargs:
                kwargs.setdefault(name, kwargs.pop(spelling))
        _read_released(kwargs)
        defaults = asdict(ModelConfig())
        for field in fields(ModelConfig):
            setattr(self, field.name, kwargs.pop(field.name, defaults[field.name]))
        self.num_steps = num_steps
        self.state_seed = state_seed
        for name, value in _FIXED.items():
            setattr(self, name, value)
        self.num_key_value_heads = self.n_kv_heads or self.n_heads
        super().__init__(tie_word_embeddings=self.tie_embeddings, **kwargs)

    @property
    def norm(self) -> str:
        """`ModelConfig.norm`; config.json stores it under its released name, norm_class_name."""
        return _NORMS[self.norm_class_name]

    @norm.setter
    def norm(self, value: str) -> None:
        self.norm_class_name = next(name for name, norm in _NORMS.items() if norm == value)

    @property
    def block(self) -> str:
        """`ModelConfig.block`; config.json stores it under its released name, block_class_name."""
        return _BLOCKS[self.block_class_name]

    @block.setter
    def block(self, value: str) -> None:
        self.block_class_name = next(name for name, block in _BLOCKS.items() if block == value)

    @property
    def num_hidden_layers(self) -> int:
        """Number of unrolled layers; transformers sizes caches by it."""
        return self.to_model_config().unrolled_layers(self.num_steps or self.mean_recurrence)

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int) -> None:
        """Ignore a stored value: the number is derived from the other fields."""

    def released_fields(self) -> dict[str, Any]:
        """Return the fields of a released config.json that this class derives from others and does not store."""
        c = self.to_model_config()
        return {
            "n_layers": c.unrolled_layers(1),
            "head_dim": c.head_dim,
            "effective_expected_depth": c.effective_depth,
            "init_values": {
                "std": c.state_std / c.embed_scale,
                "embedding": c.init_std,
                "out_proj": c.output_std,
                "embed_scale": c.embed_scale,
            },
            "padded_vocab_size": c.vocab_size,
            "padding_multiple": 64,
            "activation_checkpoint_impl": "per-iteration",
            "init_orthogonal": False,
            "test_time_noise_type": "fixed",
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the content of config.json: every field of a released folder, under its released name.

        `tie_word_embeddings` is left out: the released class sets it from `tie_embeddings` and fails if both are given.
        """
        values = super().to_diff_dict() | self.released_fields()
        defaults = ModelConfig()
        absent = ["tie_word_embeddings", *_RELEASED_AS]
        absent += [name for name in _FAMILY if getattr(self, name) == getattr(defaults, name)]
        for name in absent:
            values.pop(name, None)
        values["architectures"] = ["RavenForCausalLM"]
        if "dtype" in values:
            values["torch_dtype"] = values["dtype"]  # the name in transformers 4
        return values

    def to_model_config(self) -> ModelConfig:
        """Return the architecture as a `ModelConfig`."""
        return ModelConfig(**{field.name: getattr(self, field.name) for field in fields(ModelConfig)})

    @classmethod
    def from_model_config(cls, config: ModelConfig, **more: Any) -> "RecurrentDepthConfig":
        """Return the transformers configuration of an architecture; `more` sets further fields."""
        return cls(**asdict(config), **more)
