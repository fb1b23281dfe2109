"""Dense models of transformers that can be converted: which they are, their shape, and their weights in our layout."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recurrent_depth.hf.conversion.rotary import interleaved, rotary_scaling
from recurrent_depth.hf.loading import ModelError
from recurrent_depth.model.config import ModelConfig

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"block": "pre"},
    "mistral": {"block": "pre"},
    "qwen2": {"block": "pre", "qkv_bias": True},
    "qwen3": {"block": "pre", "qk_norm": "head"},
    "olmo2": {"block": "branch", "qk_norm": "full"},
}
"""Fields of `ModelConfig` by model_type. llama: Llama 2 and 3, TinyLlama, SmolLM2; qwen2: Qwen2 and Qwen2.5."""

_REASONS = {
    "gemma": "norms with weight 1 + w",
    "gemma2": "norms with weight 1 + w and soft-capped scores",
    "gemma3_text": "norms with weight 1 + w and a rotary embedding per layer",
    "olmo3": "sliding windows and a rotary embedding per layer",
    "smollm3": "layers without rotary embedding",
    "phi3": "partial rotary embedding",
}
"""What some well-known architectures have that this library does not implement."""


def model_config(dense: Any, split: tuple[int, int, int], **more: Any) -> ModelConfig:
    """Return the shape of the recurrent model for a dense model's configuration.

    Args:
        dense: configuration of transformers.
        split: layers of prelude, core and coda.
        more: further fields of `ModelConfig`.

    Raises:
        ModelError: if the architecture has something that is not implemented; the message names it.
    """
    check_supported(dense)
    rope = dense.rope_parameters
    return ModelConfig(
        n_embd=dense.hidden_size,
        n_heads=dense.num_attention_heads,
        n_kv_heads=None if dense.num_key_value_heads == dense.num_attention_heads else dense.num_key_value_heads,
        head_size=_head_size(dense),
        intermediate_size=dense.intermediate_size,
        n_layers_in_prelude=split[0],
        n_layers_in_recurrent_block=split[1],
        n_layers_in_coda=split[2],
        vocab_size=dense.vocab_size,
        block_size=dense.max_position_embeddings,
        norm_eps=dense.rms_norm_eps,
        rope_base=float(rope["rope_theta"]),
        rotary_scaling=rotary_scaling(rope, dense.max_position_embeddings),
        qk_bias=False,
        ln_f_before_coda=False,
        embed_multiplier=1.0,
        **ARCHITECTURES[dense.model_type] | more,
    )


def _head_size(dense: Any) -> int | None:
    size = getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
    return None if size * dense.num_attention_heads == dense.hidden_size else size


def check_supported(dense: Any) -> None:
    """Raise unless every part of the architecture is implemented; the message names what is not."""
    kind = dense.model_type
    if kind not in ARCHITECTURES:
        reason = _REASONS.get(kind, "an architecture that is not implemented")
        raise _unsupported(kind, reason)
    windows = [layer for layer in getattr(dense, "layer_types", None) or () if layer != "full_attention"]
    if windows or (kind == "mistral" and dense.sliding_window is not None):
        raise _unsupported(kind, f"sliding windows (sliding_window: {dense.sliding_window})")
    if dense.hidden_act != "silu":
        raise _unsupported(kind, f"hidden_act {dense.hidden_act!r}, and only 'silu' is implemented")
    if getattr(dense, "attention_bias", False) or getattr(dense, "mlp_bias", False):
        raise _unsupported(kind, "a bias in the output projection or the MLP")
    if "rope_theta" not in dense.rope_parameters:
        raise _unsupported(kind, "a rotary embedding per layer")
    if dense.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise _unsupported(kind, "partial rotary embedding")


def _unsupported(kind: str, reason: str) -> ModelError:
    return ModelError(
        f"model: {kind!r} has {reason}; these can be converted: {', '.join(ARCHITECTURES)}, without sliding windows"
    )


def converted_weights(dense: nn.Module, config: ModelConfig, layers: Sequence[int]) -> dict[str, Tensor]:
    """Return the weights of the recurrent model, all but the adapter, by name.

    Args:
        dense: the model of transformers.
        config: shape of the recurrent model.
        layers: the dense layers that become prelude, core and coda, in this order.

    Raises:
        ModelError: if the dense model has weights that go nowhere.
    """
    state = dict(dense.state_dict())
    weights = {"transformer.wte.weight": state.pop("model.embed_tokens.weight")}
    weights["transformer.ln_f.weight"] = state.pop("model.norm.weight")
    head = state.pop("lm_head.weight", weights["transformer.wte.weight"])
    weights["lm_head.weight"] = weights["transformer.wte.weight"] if config.tie_embeddings else head
    for target, layer in zip(block_names(config), layers, strict=True):
        prefix = f"model.layers.{layer}."
        source = {name.removeprefix(prefix): p for name, p in state.items() if name.startswith(prefix)}
        weights |= {f"{target}.{name}": p for name, p in _block_weights(source, config).items()}
        if source:
            raise ModelError(
                f"layer {layer} of the dense model has {', '.join(sorted(source))}, which have no place in the "
                "recurrent model; this architecture is not supported"
            )
    beyond = sorted(name for name in state if not name.startswith("model.layers."))
    if beyond:
        raise ModelError(f"the dense model has {', '.join(beyond)}, which have no place in the recurrent model")
    return weights


def block_names(config: ModelConfig) -> Iterator[str]:
    """Yield the names of the blocks of prelude, core and coda."""
    parts = {
        "prelude": config.n_layers_in_prelude,
        "core_block": config.n_layers_in_recurrent_block,
        "coda": config.n_layers_in_coda,
    }
    return (f"transformer.{part}.{i}" for part, count in parts.items() for i in range(count))


def _block_weights(source: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return the weights of one block, taking them out of `source`."""
    K = config.head_dim
    pre = config.block == "pre"
    attention, mlp = ("input", "post_attention") if pre else ("post_attention", "post_feedforward")
    weights = {
        "norm_1.weight": source.pop(f"{attention}_layernorm.weight"),
        "norm_2.weight": source.pop(f"{mlp}_layernorm.weight"),
        "attn.proj.weight": source.pop("self_attn.o_proj.weight"),
        "mlp.fc.weight": torch.cat([source.pop(f"mlp.{name}_proj.weight") for name in ("gate", "up")]),
        "mlp.proj.weight": source.pop("mlp.down_proj.weight"),
    }
    for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
        q, k, v = (source.pop(f"self_attn.{name}_proj.{kind}") for name in "qkv")
        weights[f"attn.Wqkv.{kind}"] = torch.cat([interleaved(q, K), interleaved(k, K), v])
    if config.qk_norm != "none":
        for name in ("q_norm", "k_norm"):
            weights[f"attn.{name}.weight"] = interleaved(source.pop(f"self_attn.{name}.weight"), K)
    return weights
