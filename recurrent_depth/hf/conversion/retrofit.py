"""Released retrofitted models (arXiv 2511.07384): read and write their folders.

Their config.json does not say what the block is, so it is told from the names of the weights. Rotary embedding is
half-split there. Their code ignores attention masks; this library honours them.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from recurrent_depth.errors import UserError
from recurrent_depth.files import write_json
from recurrent_depth.hf.configuration import RecurrentDepthConfig
from recurrent_depth.hf.conversion.rotary import half_split, interleaved, rotary_scaling
from recurrent_depth.hf.modeling import RecurrentDepthForCausalLM
from recurrent_depth.model.config import ModelConfig

_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "rope_base")
_IGNORED = ("auto_map", "architectures", "transformers_version", "_name_or_path", "block_size")
_OURS = ("auto_map", "ln_f_before_coda", "qkv_bias", "qk_norm", "rotary_scaling", "rope_base", "block_size")


class RetrofitError(UserError, ValueError):
    """A folder in the format of released retrofits that cannot be read or written; the message names the reason."""


def is_retrofit(config: dict[str, Any]) -> bool:
    """Return whether the content of a config.json is that of a retrofitted model; Huginn's has no rope_theta."""
    named_rope = "rope_theta" in config or "rope_parameters" in config
    return named_rope and config.get("model_type") == RecurrentDepthConfig.model_type


def load_retrofit(path: str | Path, dtype: torch.dtype, **options: Any) -> RecurrentDepthForCausalLM:
    """Return the model of a folder or hub name.

    Args:
        options: of transformers' `from_pretrained`, for example local_files_only.
    """
    raw = PreTrainedConfig.get_config_dict(str(path), **options)[0]
    folder = Path(path)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"], **options))
    state = _read(folder)
    model = RecurrentDepthForCausalLM(retrofit_config(raw, state))
    weights = {name: _reordered(name, p, model.model_config, interleaved) for name, p in state.items()}
    missing = sorted(set(dict(model.named_parameters())) - set(weights))
    unexpected = sorted(set(weights) - set(model.state_dict()))
    if missing or unexpected:
        raise RetrofitError(
            f"model: the weights of {path} lack {missing[:3]} and have {unexpected[:3]} beyond its config.json; take "
            "both from one folder"
        )
    model.load_state_dict(weights, strict=False)  # without the rotary table, which such folders do not hold
    return model.to(dtype)


def _read(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as content:
            state |= {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (not a mapping)
    return state


def retrofit_config(raw: dict[str, Any], names: Iterable[str]) -> RecurrentDepthConfig:
    """Return the configuration of a retrofitted model.

    Args:
        raw: content of its config.json, with rope_theta and rope_scaling (transformers 4) or rope_parameters (5).
        names: names of its weights. Without norm_3 a block has two norms; with attn.q_norm it is OLMo-2's.
    """
    names = list(names)
    if any(".norm_3." in name for name in names):
        raise RetrofitError(
            "config.json has rope_theta, as retrofitted models have, but the blocks have norm_3, as Huginn's have; "
            "this variant is not supported"
        )
    branch = any(".attn.q_norm." in name for name in names)
    rope = raw.get("rope_parameters") or {"rope_theta": raw["rope_theta"], **(raw.get("rope_scaling") or {})}
    length = raw.get("max_position_embeddings") or raw["block_size"]
    values = {name: value for name, value in raw.items() if name not in (*_ROPE, *_IGNORED, "max_position_embeddings")}
    values |= {
        "block_class_name": "BranchNormBlock" if branch else "PreNormBlock",
        "qk_norm": "full" if branch else "none",
        "qk_bias": False,
        "ln_f_before_coda": False,
        "block_size": length,
        "rope_base": float(rope["rope_theta"]),
        "rotary_scaling": rotary_scaling(rope, length),
        "tie_embeddings": "lm_head.weight" not in names,
    }
    values.pop("tie_word_embeddings", None)
    return RecurrentDepthConfig(**values)


def _reordered(name: str, p: Tensor, config: ModelConfig, order: Any) -> Tensor:
    """Return a weight with the channels of q and k in another order (`interleaved` or `half_split`)."""
    K = config.head_dim
    if ".attn.Wqkv." in name:
        q, k, v = p.split([config.n_heads * K, config.kv_heads * K, config.kv_heads * K])
        return torch.cat([order(q, K), order(k, K), v])
    return order(p, K) if ".attn.q_norm." in name or ".attn.k_norm." in name else p


def write_retrofit(model: RecurrentDepthForCausalLM, folder: Path, max_shard_size: str) -> None:
    """Write weights and config.json in the format of released retrofits, without modelling code.

    Raises:
        RetrofitError: if that format has no place for a part of the model.
    """
    c = model.model_config
    kinds = {("pre", "none"): False, ("branch", "full"): True}
    norms = {c.norm, c.core_norm or c.norm}
    if (c.block, c.qk_norm) not in kinds or norms != {"rms"} or c.qkv_bias or c.qk_bias or c.ln_f_before_coda or c.gate:
        raise RetrofitError(
            "format: retrofit holds converted Llama, TinyLlama, SmolLM2 and OLMo-2 models only (no q, k, v biases, no "
            "norms per head, no layer norms, no norm before the coda, no exit gate); export this model with --format "
            "huginn"
        )
    state = {name: _reordered(name, p, c, half_split) for name, p in model.state_dict().items() if name != "freqs_cis"}
    state["lm_head.weight"] = state["lm_head.weight"].clone()  # never tied there
    save_torch_state_dict(state, folder, max_shard_size=max_shard_size)
    released = {name: value for name, value in model.config.to_diff_dict().items() if name not in _OURS}
    scaling = model.config.rotary_scaling
    released |= {
        "block_class_name": "SandwichBlock",  # written so by the conversion code of the released models
        "max_position_embeddings": c.block_size,
        "rope_theta": c.rope_base,
        "rope_scaling": scaling and {name: value for name, value in scaling.items() if value is not None},
        "tie_embeddings": False,
    }
    write_json(folder / "config.json", released)
