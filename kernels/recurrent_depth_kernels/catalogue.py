"""All launches of the kernels at the shape of the 3.5B model, for the compilation check and the tuner."""

import torch
from torch import Tensor

from recurrent_depth_kernels import gated_mlp, noise, norm, rope
from recurrent_depth_kernels.decode_attention import decode_attention
from recurrent_depth_kernels.launch import Launch, planned
from recurrent_depth_kernels.rope_into_cache import rope_into_cache

WIDTH, HEADS, INNER = 5280, 55, 17_920
"""Shape of the published 3.5B model (arXiv 2502.05171)."""


def launches(arch: str, rows: int = 4096, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """Return the launches, forward and backward, on a GPU of `arch` (see `targets.ARCHITECTURES`). Needs no GPU."""
    with planned(arch) as found:
        _norms(rows, dtype)
        _rope(rows, dtype)
        gated_mlp.swiglu(_meta(rows, 2 * INNER, dtype=dtype)).sum().backward()
        noise.truncated_normal(_indices(1), _indices(1, rows), WIDTH, seed=0)
    return found


def decode_launches(arch: str, dtype: torch.dtype = torch.bfloat16, context: int = 4096) -> list[Launch]:
    """Return launches of decode attention: 1 and 64 rows, 1 and 4 new tokens, full and shared caches, grouped heads."""
    cases = [(1, 1, HEADS, 32), (1, 1, HEADS, 4), (1, 1, HEADS, 1), (64, 1, HEADS, 4), (1, 4, HEADS, 32), (1, 1, 11, 4)]
    with planned(arch) as found:
        for rows, new_tokens, kv_heads, budget in cases:
            _attention(rows, new_tokens, kv_heads, budget, context, dtype)
    return found


def _attention(B: int, T: int, G: int, R: int, S: int, dtype: torch.dtype) -> None:
    K = WIDTH // HEADS
    entries = torch.empty((R, 2, B, G, S, K), dtype=dtype, device="meta")
    by_row, by_column = _indices(B), _indices(B, S)
    active = torch.empty((B, T), dtype=torch.bool, device="meta")
    qkv = torch.empty((B, T, (HEADS + 2 * G) * K), dtype=dtype, device="meta")
    biases = (torch.empty((n, K), dtype=dtype, device="meta") for n in (HEADS, G))
    rotary = (torch.empty((B, T, K), device="meta") for _ in range(2))
    q = rope_into_cache(qkv, *biases, *rotary, entries, by_row, by_row, active, HEADS)
    decode_attention(q, entries, by_column, by_row, by_row, by_row, by_row, False)


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def _indices(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def _norms(rows: int, dtype: torch.dtype) -> None:
    x, y, weight = _meta(rows, WIDTH, dtype=dtype), _meta(rows, WIDTH, dtype=dtype), _meta(WIDTH, dtype=dtype)
    norm.rms_norm(x, weight, 1e-6).sum().backward()
    norm.add_norm(x, y, weight, 1e-6).sum().backward()


def _rope(rows: int, dtype: torch.dtype) -> None:
    K = WIDTH // HEADS
    table = torch.empty(1, rows, K, device="meta")
    qkv, bias = _meta(1, rows, 3 * WIDTH, dtype=dtype), _meta(2, 1, HEADS, K, dtype=dtype)
    q, k, v = rope.bias_rope(qkv, bias, table, table, HEADS)
    torch.autograd.backward([q, k, v], [torch.empty_like(x) for x in (q, k, v)])
