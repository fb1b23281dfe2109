"""Memory of fine-tuning on one card, by method and sequence length."""

from typing import Literal

import torch

from recurrent_depth.model.config import SHAPES, Checkpointing, ModelConfig
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.planning.activations import activation_bytes, head_bytes, recomputed_bytes
from recurrent_depth.planning.config import FinetuningConfig
from recurrent_depth.planning.devices import GB, RESERVE

Method = Literal["full-fp32", "full-bf16", "full-bf16-8bit", "lora"]

BYTES_PER_PARAMETER: dict[Method, tuple[int, int, int]] = {
    "full-fp32": (6, 4, 8),
    "full-bf16": (2, 2, 4),
    "full-bf16-8bit": (2, 2, 2),
    "lora": (2, 0, 0),
}
"""Bytes per parameter of weights, gradients and optimizer. full-fp32 includes the bf16 copies of autocast."""

_LORA_BYTES = 16  # per added parameter: weight, gradient and two moments in fp32
CARDS = (24, 48, 80, 141)
LENGTHS = (512, 1024, 2048, 4096)


def lora_parameters(config: ModelConfig, rank: int) -> int:
    """Return the parameters that LoRA adds on every linear layer of prelude, core and coda, and on the adapter."""
    d, i, K = config.n_embd, config.intermediate_size, config.head_dim
    q, kv = config.n_heads * K, config.kv_heads * K
    block = (d + q + 2 * kv) + (q + d) + (d + 2 * i) + (i + d)
    return rank * (config.unrolled_layers(1) * block + 2 * d + d)


def finetuning_bytes(
    config: ModelConfig,
    method: Method,
    tokens: int,
    backprop_depth: int = 8,
    checkpointing: Checkpointing = "block",
    lora_rank: int = 16,
) -> dict[str, int]:
    """Return the peak bytes of a training step at micro-batch 1, by part."""
    with torch.device("meta"):
        parameters = RecurrentDepthModel(config).num_parameters
    weights, gradients, optimizer = (parameters * size for size in BYTES_PER_PARAMETER[method])
    if method == "lora":
        optimizer += _LORA_BYTES * lora_parameters(config, lora_rank)
    steps = (max(config.mean_recurrence - backprop_depth, 0), min(backprop_depth, config.mean_recurrence))
    kept = activation_bytes(config, 1, tokens, steps, checkpointing)
    again = recomputed_bytes(config, 1, tokens, checkpointing)
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": kept + max(again, head_bytes(config, 1, tokens)),
    }


def finetuning_table(options: FinetuningConfig) -> str:
    """Return a Markdown table of peak memory in GB and the cards it fits, by method and sequence length."""
    config = SHAPES[options.shape]
    lines = ["| method | tokens | weights + gradients + optimizer, GB | activations, GB | peak, GB | fits, GB |"]
    lines.append("|---|---|---|---|---|---|")
    for method in BYTES_PER_PARAMETER:
        for tokens in (t for t in LENGTHS if t <= config.block_size):
            parts = finetuning_bytes(
                config, method, tokens, options.backprop_depth, options.checkpointing, options.lora_rank
            )
            total = sum(parts.values())
            fixed = total - parts["activations"]
            cards = [str(card) for card in CARDS if total <= card * GB * (1 - RESERVE)]
            lines.append(
                f"| {method} | {tokens} | {fixed / GB:.1f} | {parts['activations'] / GB:.1f} | {total / GB:.1f} | "
                f"{', '.join(cards) or 'none'} |"
            )
    return "\n".join(lines)
