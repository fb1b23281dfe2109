"""The modules of a block: norms, rotary attention, gated MLP, and the blocks, which differ in where norms are.

Every module runs when its block calls it; a fused kernel is an implementation of a module, chosen by its `ops`.

Shapes: B batch, T tokens, D width, H query heads, G key heads, K head size, I inner width.
"""

import torch
from torch import Tensor, nn

from recurrent_depth.model.attention import AttentionFunction, Projection, Rotary
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.ops import TORCH_OPS
from recurrent_depth.model.rope_scaling import scaled_frequencies


class RMSNorm(nn.Module):
    """RMS norm with a learned weight, computed in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.ops = TORCH_OPS
        self.weight = nn.Parameter(torch.ones(width))  # device: the default, which may be meta

    def forward(self, x: Tensor, branch: Tensor | None = None) -> Tensor:
        """Return the norm of x, or of x + branch."""
        if branch is None:
            return self.ops.rms_norm(x, self.weight, self.eps)
        return self.ops.add_norm(x, branch, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """Layer norm with a learned weight and no bias."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps, bias=False)

    def forward(self, x: Tensor, branch: Tensor | None = None) -> Tensor:
        """Return the norm of x, or of x + branch."""
        return super().forward(x if branch is None else x + branch)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}
"""Norms by the name in `ModelConfig.norm`: classes with `__init__(width, eps)` and `forward(x, branch=None)`."""


def make_norm(config: ModelConfig) -> nn.Module:
    """Return a new norm of the configured class."""
    return NORMS[config.norm](config.n_embd, config.norm_eps)


class Attention(nn.Module):
    """Self-attention with one fused projection and interleaved RoPE.

    Huginn adds a learned bias to q and k after the projection (`qk_bias`); other models have a bias in the projection
    (`qkv_bias`) or norms of q and k (`qk_norm`).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        H, G, K = config.n_heads, config.kv_heads, config.head_dim
        self.n_heads = H
        self.ops = TORCH_OPS
        self.Wqkv = nn.Linear(config.n_embd, (H + 2 * G) * K, bias=config.qkv_bias)
        # device: the default, which may be meta
        self.qk_bias = nn.Parameter(torch.zeros(2, 1, H, K)) if config.qk_bias else None
        self.proj = nn.Linear(H * K, config.n_embd, bias=False)
        self.q_norm = self.k_norm = None
        if config.qk_norm != "none":
            heads = (1, 1) if config.qk_norm == "head" else (H, G)
            self.q_norm, self.k_norm = (RMSNorm(n * K, config.norm_eps) for n in heads)
        self.sizes = (H * K, G * K, G * K)  # rows of q, k and v in the projection

    def forward(self, x: Tensor, rotary: Rotary, attention: AttentionFunction, layer_index: int) -> Tensor:
        qkv = self.Wqkv(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split(self.sizes, dim=-1)
            qkv = torch.cat([_norm_parts(self.q_norm, q), _norm_parts(self.k_norm, k), v], dim=-1)
        projection = Projection(qkv, self.qk_bias, rotary, self.n_heads, self.ops)
        return self.proj(attention(projection, layer_index))


def _norm_parts(norm: RMSNorm, x: Tensor) -> Tensor:
    """Return the norm of x [..., n W] over each part of the norm's width W."""
    return norm(x.unflatten(-1, (-1, len(norm.weight)))).flatten(-2)


class GatedMLP(nn.Module):
    """proj(silu(gate) * up), with gate and up from one projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ops = TORCH_OPS
        self.fc = nn.Linear(config.n_embd, 2 * config.intermediate_size, bias=False)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.ops.swiglu(self.fc(x)))


class SandwichBlock(nn.Module):
    """Huginn: x = norm_2(x + attn(norm_1(x))), then x = norm_4(x + mlp(norm_3(x))) (arXiv 2502.05171, section 3.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_1 = make_norm(config)
        self.attn = Attention(config)
        self.norm_2 = make_norm(config)
        self.norm_3 = make_norm(config)
        self.mlp = GatedMLP(config)
        self.norm_4 = make_norm(config)

    def forward(self, x: Tensor, rotary: Rotary, attention: AttentionFunction, layer_index: int) -> Tensor:
        """Return the output [B, T, D] for x [B, T, D]."""
        x = self.norm_2(x, self.attn(self.norm_1(x), rotary, attention, layer_index))
        return self.norm_4(x, self.mlp(self.norm_3(x)))


class PreNormBlock(nn.Module):
    """Llama, Qwen: x = x + attn(norm_1(x)), then x = x + mlp(norm_2(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_1 = make_norm(config)
        self.attn = Attention(config)
        self.norm_2 = make_norm(config)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, rotary: Rotary, attention: AttentionFunction, layer_index: int) -> Tensor:
        """Return the output [B, T, D] for x [B, T, D]."""
        x = x + self.attn(self.norm_1(x), rotary, attention, layer_index)
        return x + self.mlp(self.norm_2(x))


class BranchNormBlock(PreNormBlock):
    """OLMo-2: x = x + norm_1(attn(x)), then x = x + norm_2(mlp(x))."""

    def forward(self, x: Tensor, rotary: Rotary, attention: AttentionFunction, layer_index: int) -> Tensor:
        """Return the output [B, T, D] for x [B, T, D]."""
        x = x + self.norm_1(self.attn(x, rotary, attention, layer_index))
        return x + self.norm_2(self.mlp(x))


BLOCKS = {"sandwich": SandwichBlock, "pre": PreNormBlock, "branch": BranchNormBlock}
"""Blocks by the name in `ModelConfig.block`."""


def make_block(config: ModelConfig) -> nn.Module:
    """Return a new block of the configured class."""
    return BLOCKS[config.block](config)


def rotary_table(config: ModelConfig) -> Tensor:
    """Return cos and sin by position, [1, block_size, 1, K/2, 2] in fp32: the buffer `freqs_cis` of released models."""
    # device: the default, which may be meta; not the GPU, whose cos and sin differ in the last bits
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies, scale = 1.0 / config.rope_base**exponents, 1.0
    if config.rotary_scaling is not None:
        frequencies, scale = scaled_frequencies(frequencies, config.rope_base, config.rotary_scaling)
    positions = torch.arange(config.block_size, device=exponents.device).float()
    angles = torch.outer(positions, frequencies)
    return torch.stack([angles.cos() * scale, angles.sin() * scale], dim=-1)[None, :, None]


def rotary_at(table: Tensor, position_ids: Tensor) -> Rotary:
    """Return cos and sin [B or 1, T, K] of position_ids [B or 1, T], in the layout of p*cos + flip(p)*sin."""
    cos, sin = table[0, :, 0][position_ids].unbind(-1)  # [B, T, K/2]
    return cos.repeat_interleave(2, dim=-1), torch.stack([-sin, sin], dim=-1).flatten(-2)
