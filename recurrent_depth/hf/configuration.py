"""config.json of a recurrent-depth model, in the released Huginn format."""

from dataclasses import asdict, fields
from typing import Any

from transformers import PreTrainedConfig

from recurrent_depth.model.config import ModelConfig

_FIXED = {
    "architecture_class_name": "RecurrentGPT",
    "block_class_name": "SandwichBlock",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "injection_type": "linear",
    "init_strategy": "takase",
    "bias": False,
    "test_time_noise": 0,
}
"""Fields of a Huginn folder that name parts of the architecture; these values are the ones implemented."""

_DERIVED = (
    "n_layers",
    "num_hidden_layers",
    "head_dim",
    "init_values",
    "effective_expected_depth",
    "padded_vocab_size",
    "padding_multiple",
    "activation_checkpoint_impl",
    "init_orthogonal",
    "test_time_noise_type",
)
"""Fields of a Huginn folder that follow from others or do not matter to a loaded model."""

_NORMS = {"RMSNorm_llama": "rms", "LayerNorm": "layer"}
"""By the released name of the field, norm_class_name: the norms of `ModelConfig.norm`."""

_SPELLINGS = {"num_attention_heads": "n_heads", "tie_word_embeddings": "tie_embeddings"}


class RecurrentDepthConfig(PreTrainedConfig):
    """Fields of `ModelConfig`, and what a forward pass does unless a call says otherwise.

    Args:
        num_steps: core iterations, in training too; null: mean_recurrence, and sampled depths in training.
        state_seed: draw the initial state from (seed, position, channel); null: zeros.
    """

    model_type = "huginn_raven"
    attribute_map = {  # noqa: RUF012 (the name and form are transformers')
        "hidden_size": "n_embd",
        "max_position_embeddings": "block_size",
        "num_attention_heads": "n_heads",
    }
    keys_to_ignore_at_inference = ["past_key_values", "last_state", "latent_states"]  # noqa: RUF012

    def __init__(self, num_steps: int | None = None, state_seed: int | None = None, **kwargs: Any) -> None:
        for name, implemented in _FIXED.items():
            value = kwargs.pop(name, implemented)
            if value != implemented:
                raise ValueError(f"config.json has {name}: {value!r}; only {implemented!r} is implemented")
        norm = kwargs.pop("norm_class_name", "RMSNorm_llama")
        if norm not in _NORMS:
            raise ValueError(f"config.json has norm_class_name: {norm!r}; implemented are {', '.join(_NORMS)}")
        kwargs.setdefault("norm", _NORMS[norm])
        for name in _DERIVED:
            kwargs.pop(name, None)
        for spelling, name in _SPELLINGS.items():
            if spelling in kwargs:
                kwargs.setdefault(name, kwargs.pop(spelling))
        if kwargs.pop("num_key_value_heads", None) not in (None, kwargs.get("n_heads")):
            raise ValueError("config.json asks for grouped key-value heads; only n_heads of them are implemented")
        defaults = asdict(ModelConfig())
        for field in fields(ModelConfig):
            setattr(self, field.name, kwargs.pop(field.name, defaults[field.name]))
        self.num_steps = num_steps
        self.state_seed = state_seed
        for name, value in _FIXED.items():
            setattr(self, name, value)
        self.num_key_value_heads = self.n_heads
        super().__init__(tie_word_embeddings=self.tie_embeddings, **kwargs)

    @property
    def norm(self) -> str:
        """`ModelConfig.norm`, kept under the released name of the field."""
        return _NORMS[self.norm_class_name]

    @norm.setter
    def norm(self, value: str) -> None:
        self.norm_class_name = next(name for name, norm in _NORMS.items() if norm == value)

    @property
    def num_hidden_layers(self) -> int:
        """Layers a token passes: caches are sized by it."""
        return self.to_model_config().unrolled_layers(self.num_steps or self.mean_recurrence)

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int) -> None:
        """Derived; a stored value is ignored."""

    def released_fields(self) -> dict[str, Any]:
        """The fields of a released config.json that ours leaves out because others give them."""
        c = self.to_model_config()
        return {
            "n_layers": c.unrolled_layers(1),
            "head_dim": c.head_dim,
            "effective_expected_depth": c.effective_depth,
            "init_values": {
                "std": c.init_std,
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
        """Return what config.json holds: every field of a released folder, where there are two spellings the released.

        The released class passes `tie_word_embeddings` on from `tie_embeddings`; a file with both does not load there.
        """
        values = super().to_diff_dict() | self.released_fields()
        values.pop("tie_word_embeddings", None)
        values["architectures"] = ["RavenForCausalLM"]
        if "dtype" in values:
            values["torch_dtype"] = values["dtype"]  # the name in transformers 4
        return values

    def to_model_config(self) -> ModelConfig:
        """The architecture alone."""
        return ModelConfig(**{field.name: getattr(self, field.name) for field in fields(ModelConfig)})

    @classmethod
    def from_model_config(cls, config: ModelConfig, **more: Any) -> "RecurrentDepthConfig":
        """The other way."""
        return cls(**asdict(config), **more)
