"""`recurrent-depth plan`: the memory of fine-tuning, before a GPU is rented.

Activations are not estimated by a formula: the model runs on torch's meta device, which allocates nothing, and every
tensor that autograd would keep is counted. Shapes: B batch, T tokens, H heads, K head size.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from recurrent_depth.model.config import SHAPES, ModelConfig
from recurrent_depth.model.layers import rotary_at
from recurrent_depth.model.recurrence import Checkpointing
from recurrent_depth.model.transformer import RecurrentDepthModel

Method = Literal["full-fp32", "full-bf16", "full-bf16-8bit", "lora"]

BYTES_PER_PARAMETER: dict[Method, tuple[int, int, int]] = {
    "full-fp32": (6, 4, 8),
    "full-bf16": (2, 2, 4),
    "full-bf16-8bit": (2, 2, 2),
    "lora": (2, 0, 0),
}
"""Weights, gradients, optimizer: fp32 with the bf16 copies of autocast; all in bf16; bf16 and an 8-bit Adam; frozen."""

_LORA_BYTES = 16  # weights, gradients and two moments in fp32, of the added matrices alone
_GB = 10**9
RESERVE = 0.08
"""Share of a card left free: the CUDA context, cuBLAS workspaces, fragmentation. An allowance, not a measurement."""

CARDS = (24, 48, 80, 141)
LENGTHS = (512, 1024, 2048, 4096)


@dataclass(frozen=True)
class PlanConfig:
    """Print which fine-tuning fits which card.

    Args:
        shape: a named shape: tiny, small, huginn-3.5b.
        backprop_depth: steps of the core with gradient (k).
        checkpointing: recompute in the backward pass: none, step, block.
        lora_rank: of LoRA on every linear layer.
    """

    shape: str = "huginn-3.5b"
    backprop_depth: int = 8
    checkpointing: Checkpointing = "block"
    lora_rank: int = 16

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape is {self.shape!r}; known shapes are {', '.join(SHAPES)}")
        if self.backprop_depth < 1 or self.lora_rank < 1:
            raise ValueError("backprop_depth and lora_rank must be at least 1")


def plan(config: PlanConfig) -> None:
    """Print the table."""
    print(finetuning_table(config))


class _Flash(torch.autograd.Function):
    """Attention's shape and what a fused kernel keeps (q, k, v, the output, a number a query); no arithmetic."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:3], device=q.device))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("nothing is computed here")


def activation_bytes(
    config: ModelConfig,
    batch: int,
    tokens: int,
    steps: tuple[int, int],
    checkpointing: Checkpointing = "none",
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes that autograd keeps from prelude to coda for a backward pass; the head and its loss are not included."""
    with torch.device("meta"):
        model = RecurrentDepthModel(config).to(dtype)
        table = torch.empty(model.freqs_cis.shape)
        rotary = rotary_at(table, torch.zeros(1, tokens, dtype=torch.long))
        ids = torch.zeros(batch, tokens, dtype=torch.long)
    model.transformer.core_block.activation_checkpointing = checkpointing
    owned = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = (storage.nbytes(), tensor)  # the tensor, so that no address is used twice
        return tensor

    def attend(q: Tensor, k: Tensor, v: Tensor, slot: int) -> Tensor:
        return _Flash.apply(q, k, v)

    part = model.transformer
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        e = part.read(part.embed(ids), rotary, attend)
        state = part.think(torch.zeros_like(e), e, steps, rotary, attend)
        part.write(state, rotary, attend)
    return sum(size for size, _ in kept.values())


def head_bytes(config: ModelConfig, batch: int, tokens: int) -> int:
    """Logits of all tokens at once: in bf16 and fp32, their softmax and its gradient in fp32, the gradient in bf16."""
    return batch * tokens * config.vocab_size * (2 + 4 + 4 + 4 + 2)


def block_bytes(config: ModelConfig, batch: int, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """What one recomputed block keeps while its own backward pass runs."""
    one, two = (activation_bytes(config, batch, tokens, (0, k), "none", dtype) for k in (1, 2))
    return (two - one) // config.n_layers_in_recurrent_block


def lora_parameters(config: ModelConfig, rank: int) -> int:
    """Added weights of LoRA on every linear layer of prelude, core and coda, and on the adapter."""
    d, i = config.n_embd, config.intermediate_size
    block = (d + 3 * d) + (d + d) + (d + 2 * i) + (i + d)
    return rank * (config.unrolled_layers(1) * block + 2 * d + d)


def finetuning_bytes(
    config: ModelConfig,
    method: Method,
    tokens: int,
    backprop_depth: int = 8,
    checkpointing: Checkpointing = "block",
    lora_rank: int = 16,
) -> dict[str, int]:
    """Peak bytes of a fine-tuning step at micro-batch 1, by part."""
    with torch.device("meta"):
        parameters = RecurrentDepthModel(config).num_parameters
    weights, gradients, optimizer = (parameters * size for size in BYTES_PER_PARAMETER[method])
    if method == "lora":
        optimizer += _LORA_BYTES * lora_parameters(config, lora_rank)
    steps = (max(config.mean_recurrence - backprop_depth, 0), min(backprop_depth, config.mean_recurrence))
    kept = activation_bytes(config, 1, tokens, steps, checkpointing)
    again = block_bytes(config, 1, tokens)
    again *= {"none": 0, "block": 1, "step": config.n_layers_in_recurrent_block}[checkpointing]
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": kept + max(again, head_bytes(config, 1, tokens)),
    }


def finetuning_table(config: PlanConfig) -> str:
    """Markdown: a row per method and sequence length, the peak in GB, and the cards it fits."""
    shape = SHAPES[config.shape]
    lines = ["| method | tokens | weights + gradients + optimizer, GB | activations, GB | peak, GB | fits, GB |"]
    lines.append("|---|---|---|---|---|---|")
    for method in BYTES_PER_PARAMETER:
        for tokens in (t for t in LENGTHS if t <= shape.block_size):
            parts = finetuning_bytes(
                shape,
                method,
                tokens,
                config.backprop_depth,
                config.checkpointing,
                config.lora_rank,
            )
            total = sum(parts.values())
            fixed = total - parts["activations"]
            cards = [str(card) for card in CARDS if total <= card * _GB * (1 - RESERVE)]
            lines.append(
                f"| {method} | {tokens} | {fixed / _GB:.1f} | {parts['activations'] / _GB:.1f} | {total / _GB:.1f} | "
                f"{', '.join(cards) or 'none'} |"
            )
    return "\n".join(lines)
