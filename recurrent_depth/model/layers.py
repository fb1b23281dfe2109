"""The blocks: RMSNorm, rotary attention, gated MLP, and the sandwich that joins them (arXiv 2502.05171, section 3).

Shapes: B batch, T tokens, D width, H heads, K head size, I inner width.
"""

import torch
from torch import Tensor, nn

from recurrent_depth.model.attention import Attend, ProjectedAttend
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.ops import TORCH_OPS

Rotary = tuple[Tensor, Tensor]
"""cos and signed sin, each [B or 1, T, K] in fp32."""


class RMSNorm(nn.Module):
    """RMS norm with a learned weight, computed in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.ops = TORCH_OPS
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with one fused projection, a learned bias on q and k, and interleaved RoPE."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.ops = TORCH_OPS
        self.Wqkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        shape = (2, 1, config.n_heads, config.head_dim)
        self.qk_bias = nn.Parameter(torch.zeros(shape)) if config.qk_bias else None
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend, slot: int) -> Tensor:
        qkv = self.Wqkv(x)
        if isinstance(attend, ProjectedAttend):
            y = attend.attend(self.ops, qkv, self.qk_bias, rotary, slot)
        else:
            y = attend(*self.ops.bias_rope(qkv, self.qk_bias, *rotary, self.n_heads), slot)  # [B, H, T, K]
        return self.proj(y.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """proj(silu(gate) * up), gate and up from one projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ops = TORCH_OPS
        self.fc = nn.Linear(config.n_embd, 2 * config.intermediate_size, bias=False)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.ops.swiglu(self.fc(x)))


class SandwichBlock(nn.Module):
    """x = norm_2(x + attn(norm_1(x))), then x = norm_4(x + mlp(norm_3(x))): norms wrap the residual sums."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, eps = config.n_embd, config.norm_eps
        self.ops = TORCH_OPS
        self.norm_1 = RMSNorm(width, eps)
        self.attn = Attention(config)
        self.norm_2 = RMSNorm(width, eps)
        self.norm_3 = RMSNorm(width, eps)
        self.mlp = GatedMLP(config)
        self.norm_4 = RMSNorm(width, eps)

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend, slot: int) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        y = self.attn(self.norm_1(x), rotary, attend, slot)
        x, y = self.ops.add_norm_norm(x, y, self.norm_2.weight, self.norm_3.weight, self.norm_2.eps)
        return self.ops.add_norm(x, self.mlp(y), self.norm_4.weight, self.norm_4.eps)


def rotary_table(config: ModelConfig) -> Tensor:
    """cos and sin by position: [1, block_size, 1, K/2, 2] in fp32, the buffer `freqs_cis` of released checkpoints."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(config.block_size).float(), 1.0 / config.rope_base**exponents)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)[None, :, None]


def rotary_at(table: Tensor, position_ids: Tensor) -> Rotary:
    """Rows of the table for position_ids [B or 1, T], laid out for p*cos + flip(p)*sin: each [B or 1, T, K]."""
    cos, sin = table[0, :, 0][position_ids].unbind(-1)  # [B, T, K/2]
    return cos.repeat_interleave(2, dim=-1), torch.stack([-sin, sin], dim=-1).flatten(-2)
