"""Add the bias to q and k of new tokens, rotate them, and write k, v into the cache, in one kernel.

Shapes: B batch, T new tokens, S cached columns, H query heads, G key heads, K head size, R budget of iterations.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from recurrent_depth_kernels.launch import Launch
from recurrent_depth_kernels.registry import op


@triton.jit
def _rotated(x, bias, cos, sin, real, channel, HAS_BIAS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return one head [K] with interleaved RoPE, (x0 cos - x1 sin, x1 cos + x0 sin), computed in the dtype of cos."""
    p = tl.load(x + channel, mask=real, other=0).to(cos.dtype)
    if HAS_BIAS:
        p += tl.load(bias + channel, mask=real, other=0).to(cos.dtype)
    even, odd = tl.split(tl.reshape(p, (BLOCK_K // 2, 2)))
    flipped = tl.reshape(tl.join(odd, even), (BLOCK_K,))
    return p * cos + flipped * sin


@triton.jit
def rotate_and_store(
    qkv, q_bias, k_bias, cos, sin, q, entries, steps, columns, active,
    stride_cb, stride_place, stride_kv, stride_eb, stride_eh, stride_s, T, n_heads, n_kv_heads,
    K: tl.constexpr, BUDGET: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_K: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Process one query head of one token; the first `n_kv_heads` programs of a token also a key and a value head."""
    token, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, t = token // T, token % T
    channel = tl.arange(0, BLOCK_K)
    real = channel < K
    angle = b * stride_cb + t * K + channel
    c = tl.load(cos + angle, mask=real, other=0).to(ACCUMULATE)
    s = tl.load(sin + angle, mask=real, other=0).to(ACCUMULATE)
    x = qkv + token * (n_heads + 2 * n_kv_heads) * K
    turned = _rotated(x + h * K, q_bias + h * K, c, s, real, channel, HAS_BIAS, BLOCK_K)
    tl.store(q + ((b * n_heads + h) * T + t) * K + channel, turned.to(q.dtype.element_ty), mask=real)
    if (h < n_kv_heads) & (tl.load(active + token) != 0):
        place = (tl.load(steps + b) % BUDGET) * stride_place + b * stride_eb + h * stride_eh
        place += (tl.load(columns + b) + t) * stride_s
        k_from, v_from = x + (n_heads + h) * K, x + (n_heads + n_kv_heads + h) * K
        turned = _rotated(k_from, k_bias + h * K, c, s, real, channel, HAS_BIAS, BLOCK_K)
        v = tl.load(v_from + channel, mask=real, other=0)
        tl.store(entries + place + channel, turned.to(entries.dtype.element_ty), mask=real)
        tl.store(entries + place + stride_kv + channel, v.to(entries.dtype.element_ty), mask=real)


@partial(op, mutates=("entries",))
def rope_into_cache(
    qkv: Tensor, q_bias: Tensor | None, k_bias: Tensor | None, cos: Tensor, sin: Tensor, entries: Tensor,
    steps: Tensor, columns: Tensor, active: Tensor, n_heads: int,
) -> Tensor:  # fmt: skip
    """Return q, and write k, v of the active tokens to place steps mod R, from each row's column on. Forward only.

    Args:
        qkv: [B, T, (H + 2 G) K], the fused projection: H query heads, G key heads, G value heads.
        q_bias, k_bias: [H, K] and [G, K], or both None.
        cos, sin: [B or 1, T, K] in fp32; `sin` carries the sign of its pair (-, +, -, +, ...).
        entries: [R, 2, B, G, S, K], one layer's part of the cache, changed in place.
        steps: [B], the iteration of each row, from 0.
        columns: [B], the column of each row's first new token.
        active: [B, T], nonzero where k, v of a token are written; q is returned for all tokens.
        n_heads: H.

    Returns:
        [B, H, T, K] in the dtype of qkv; rotated in fp32 (fp64 for fp64) and rounded once.
    """
    B, T, width = qkv.shape
    R, two, rows, G, _, K = entries.shape
    if (two, rows) != (2, B) or width != (n_heads + 2 * G) * K:
        raise ValueError(
            f"qkv {tuple(qkv.shape)} does not fit entries {tuple(entries.shape)}: with {n_heads} query heads it must "
            f"be [{rows}, T, {(n_heads + 2 * G) * K}]"
        )
    qkv, cos, sin, active = qkv.contiguous(), cos.contiguous(), sin.contiguous(), active.contiguous()
    has_bias = q_bias is not None and k_bias is not None
    q = torch.empty((B, n_heads, T, K), dtype=qkv.dtype, device=qkv.device)
    arguments = {
        "qkv": qkv, "q_bias": q_bias.contiguous() if q_bias is not None else qkv,
        "k_bias": k_bias.contiguous() if k_bias is not None else qkv, "cos": cos, "sin": sin, "q": q,
        "entries": entries, "steps": steps, "columns": columns, "active": active,
        "stride_cb": 0 if cos.shape[0] == 1 else T * K, "stride_place": entries.stride(0),
        "stride_kv": entries.stride(1), "stride_eb": entries.stride(2), "stride_eh": entries.stride(3),
        "stride_s": entries.stride(4), "T": T, "n_heads": n_heads, "n_kv_heads": G,
    }  # fmt: skip
    constants = {
        "K": K, "BUDGET": R, "HAS_BIAS": has_bias, "BLOCK_K": triton.next_power_of_2(K),
        "ACCUMULATE": tl.float64 if qkv.dtype == torch.float64 else tl.float32,
    }  # fmt: skip
    Launch(rotate_and_store, (B * T, n_heads), arguments, constants, 1, 1).run()
    return q
