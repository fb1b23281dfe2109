"""Attention of new tokens over a recurrence-indexed cache, read in place (split over keys, as flash-decoding is).

Iteration i reads and writes place i mod R (arXiv 2502.05171, section 6.2); a cached token that stopped after d
iterations has nothing at places d and above, and is seen by its deepest: place min(i mod R, d - 1). Both numbers live
on the device, so no entry is gathered and no host waits.

Shapes: B batch, T new tokens, S cached columns, H query heads, G key heads, K head size, R budget of recurrences.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from recurrent_depth_kernels.launch import Launch
from recurrent_depth_kernels.registry import op
from recurrent_depth_kernels.targets import processors
from recurrent_depth_kernels.tuning import settings

LOWEST = tl.constexpr(-1.0e38)  # below every score, and finite: exp(LOWEST - LOWEST) is 1, not NaN


@triton.jit
def _columns(
    start, end, own_first, step, depths, mask, row_depths, row_mask, stride_slot, stride_s,
    BUDGET: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Which of the columns from `start` on hold a token (new ones do), and where the entry to be read lies."""
    column = start + tl.arange(0, BLOCK_S)
    held = column < end
    if HAS_MASK:
        held = held & ((tl.load(mask + row_mask + column, mask=held, other=0) != 0) | (column >= own_first))
    place = column.to(tl.int64) * stride_s
    if BUDGET > 1:
        depth = tl.load(depths + row_depths + column, mask=held, other=1)
        place += tl.minimum(step % BUDGET, depth - 1) * stride_slot
    return column, held, place


@triton.jit
def attend_one(
    q, entries, depths, mask, steps, lengths, partial, peak, total, scale,
    stride_qb, stride_qh, stride_slot, stride_kv, stride_eb, stride_eh, stride_s, stride_db, stride_mb, n_heads,
    K: tl.constexpr, BUDGET: tl.constexpr, HAS_MASK: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """One query a key head: vectors, no matrix product. A program reads one split of the columns of one (row, head).

    Each of the BLOCK_S lanes runs a softmax of its own; they are joined after the loop.
    """
    pair, split = tl.program_id(0), tl.program_id(1)
    b, h = (pair // n_heads).to(tl.int64), pair % n_heads
    length, step = tl.load(lengths + b), tl.load(steps + b)
    chunk = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_S) * BLOCK_S
    channel = tl.arange(0, BLOCK_K)
    real = channel < K
    query = tl.load(q + b * stride_qb + h * stride_qh + channel, mask=real, other=0).to(ACCUMULATE) * scale
    base = entries + b * stride_eb + h * stride_eh

    m = tl.full((BLOCK_S,), LOWEST, ACCUMULATE)
    z = tl.zeros((BLOCK_S,), ACCUMULATE)
    y = tl.zeros((BLOCK_S, BLOCK_K), ACCUMULATE)
    end = tl.minimum(split * chunk + chunk, length)
    for start in range(split * chunk, end, BLOCK_S):
        _, held, place = _columns(
            start, end, length - 1, step, depths, mask, b * stride_db, b * stride_mb, stride_slot, stride_s,
            BUDGET, HAS_MASK, BLOCK_S,
        )  # fmt: skip
        pointer, wanted = base + place[:, None] + channel[None, :], held[:, None] & real[None, :]
        k = tl.load(pointer, mask=wanted, other=0)
        v = tl.load(pointer + stride_kv, mask=wanted, other=0)
        score = tl.where(held, tl.sum(query[None, :] * k.to(ACCUMULATE), 1), -float("inf"))
        higher = tl.maximum(m, score)
        shrink, p = tl.exp(m - higher), tl.exp(score - higher)
        y = y * shrink[:, None] + p[:, None] * v.to(ACCUMULATE)
        z = z * shrink + p
        m = higher

    top = tl.max(m, 0)
    weight = tl.exp(m - top)
    out = pair.to(tl.int64) * SPLITS + split
    tl.store(partial + out * K + channel, tl.sum(y * weight[:, None], 0), mask=real)
    tl.store(peak + out, top)
    tl.store(total + out, tl.sum(z * weight, 0))


@triton.jit
def attend_many(
    q, entries, depths, mask, steps, lengths, partial, peak, total, scale,
    stride_qb, stride_qh, stride_qt, stride_slot, stride_kv, stride_eb, stride_eh, stride_s, stride_db, stride_mb,
    n_heads, T,
    K: tl.constexpr, GROUP: tl.constexpr, BUDGET: tl.constexpr, HAS_MASK: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Several queries a key head, T tokens times GROUP heads, in one matrix product (padded to ROWS)."""
    pair, split = tl.program_id(0), tl.program_id(1)
    b, h = (pair // n_heads).to(tl.int64), pair % n_heads
    length, step = tl.load(lengths + b), tl.load(steps + b)
    chunk = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_S) * BLOCK_S
    channel = tl.arange(0, BLOCK_K)
    real = channel < K
    row = tl.arange(0, ROWS)
    t = row // GROUP
    head = h * GROUP + row % GROUP
    query = tl.load(
        q + b * stride_qb + (head * stride_qh + t * stride_qt)[:, None] + channel[None, :],
        mask=(t < T)[:, None] & real[None, :], other=0,
    )  # fmt: skip
    base = entries + b * stride_eb + h * stride_eh
    own = length - T + t  # the column of each query's own token

    m = tl.full((ROWS,), LOWEST, ACCUMULATE)
    z = tl.zeros((ROWS,), ACCUMULATE)
    y = tl.zeros((ROWS, BLOCK_K), ACCUMULATE)
    end = tl.minimum(split * chunk + chunk, length)
    for start in range(split * chunk, end, BLOCK_S):
        column, held, place = _columns(
            start, end, length - T, step, depths, mask, b * stride_db, b * stride_mb, stride_slot, stride_s,
            BUDGET, HAS_MASK, BLOCK_S,
        )  # fmt: skip
        pointer, wanted = base + place[:, None] + channel[None, :], held[:, None] & real[None, :]
        k = tl.load(pointer, mask=wanted, other=0)
        v = tl.load(pointer + stride_kv, mask=wanted, other=0)
        score = tl.dot(query, tl.trans(k), input_precision="ieee", out_dtype=ACCUMULATE) * scale
        seen = held[None, :] & (column[None, :] <= own[:, None])
        if HAS_MASK:  # a new token that is padding is seen by itself alone
            token = tl.load(mask + b * stride_mb + column, mask=held, other=0) != 0
            seen = seen & (token[None, :] | (column[None, :] == own[:, None]))
        score = tl.where(seen, score, -float("inf"))
        higher = tl.maximum(m, tl.max(score, 1))
        shrink, p = tl.exp(m - higher), tl.exp(score - higher[:, None])
        y = y * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee", out_dtype=ACCUMULATE)
        z = z * shrink + tl.sum(p, 1)
        m = higher

    out = ((pair.to(tl.int64) * GROUP + row % GROUP) * T + t) * SPLITS + split
    tl.store(partial + out[:, None] * K + channel[None, :], y, mask=(t < T)[:, None] & real[None, :])
    tl.store(peak + out, m, mask=t < T)
    tl.store(total + out, z, mask=t < T)


@triton.jit
def join_splits(
    partial, peak, total, out, K: tl.constexpr, SPLITS: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """The weighted mean of the splits of one query."""
    query = tl.program_id(0).to(tl.int64)  # of [B, H, T]
    split = query * SPLITS + tl.arange(0, SPLITS)
    channel = tl.arange(0, BLOCK_K)
    m = tl.load(peak + split)
    weight = tl.exp(m - tl.max(m, 0))
    y = tl.load(partial + split[:, None] * K + channel[None, :], mask=(channel < K)[None, :], other=0)
    y = tl.sum(y * weight[:, None], 0) / tl.sum(tl.load(total + split) * weight, 0)
    tl.store(out + query * K + channel, y.to(out.dtype.element_ty), mask=channel < K)


@op
def decode_attention(
    q: Tensor, entries: Tensor, depths: Tensor, mask: Tensor | None, steps: Tensor, lengths: Tensor
) -> Tensor:
    """softmax(q kᵀ / sqrt(K)) v over the columns a token may see; forward only.

    Args:
        q: [B, H, T, K], the queries of the last T of each row's columns.
        entries: [R, 2, B, G, S, K], keys and values of one layer; H is a multiple of G. Any strides but the last.
        depths: [B, S], steps each token has taken, the running one included; at least 1.
        mask: [B, S], nonzero where a column holds a real token; None: everywhere. A new padding token sees itself.
        steps: [B], the step i that each row is at, from 0.
        lengths: [B], columns in use, the T new ones included.

    Returns:
        [B, H, T, K] in q's dtype, accumulated in fp32 (fp64 for fp64).
    """
    B, H, T, K = q.shape
    R, _, _, G, S, _ = entries.shape
    _check(q, entries, {"depths": depths, "mask": mask})
    group = H // G
    kernel, name = (attend_one, "attend_one") if group * T == 1 else (attend_many, "attend_many")
    chosen = settings(name, K, q.dtype, q.device)
    block = max(chosen["block"] * 2 // q.element_size(), 16)  # the table counts columns of two-byte numbers
    splits = splits_for(B * G, S, block, chosen["waves"] * processors(q.device))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q = q if q.stride(-1) == 1 else q.contiguous()
    out = torch.empty((B, H, T, K), dtype=q.dtype, device=q.device)
    partial = torch.empty((B * H * T, splits, K), dtype=wide, device=q.device)
    peak = torch.empty((B * H * T, splits), dtype=wide, device=q.device)
    total = torch.empty_like(peak)
    parts = {"partial": partial, "peak": peak, "total": total}
    arguments: dict[str, Any] = {
        "q": q, "entries": entries, "depths": depths, "mask": depths if mask is None else mask, "steps": steps,
        "lengths": lengths, **parts, "scale": K**-0.5, "stride_qb": q.stride(0), "stride_qh": q.stride(1),
        "stride_slot": entries.stride(0), "stride_kv": entries.stride(1), "stride_eb": entries.stride(2),
        "stride_eh": entries.stride(3), "stride_s": entries.stride(4), "stride_db": depths.stride(0),
        "stride_mb": 0 if mask is None else mask.stride(0), "n_heads": G,
    }  # fmt: skip
    constants: dict[str, Any] = {
        "K": K, "BUDGET": R, "HAS_MASK": mask is not None, "SPLITS": splits, "BLOCK_S": block,
        "BLOCK_K": triton.next_power_of_2(K), "ACCUMULATE": tl.float64 if wide == torch.float64 else tl.float32,
    }  # fmt: skip
    if kernel is attend_many:
        arguments |= {"stride_qt": q.stride(2), "T": T}
        constants |= {"GROUP": group, "ROWS": max(16, triton.next_power_of_2(group * T))}
    Launch(kernel, (B * G, splits), arguments, constants, chosen["num_warps"], 1).run()
    joined = {name: constants[name] for name in ("K", "SPLITS", "BLOCK_K")}
    Launch(join_splits, (B * H * T,), {**parts, "out": out}, joined, 4, 1).run()
    return out


def splits_for(pairs: int, columns: int, block: int, programs: int) -> int:
    """Splits of the columns, a power of two: as many programs as wished for, no split below one block."""
    most = max(1, min(programs // pairs, triton.cdiv(columns, block), 16))
    return 1 << (most.bit_length() - 1)


def _check(q: Tensor, entries: Tensor, by_column: dict[str, Tensor | None]) -> None:
    B, H, _, K = q.shape
    _, two, rows, G, _, size = entries.shape
    if (two, rows, size) != (2, B, K) or H % G:
        raise ValueError(
            f"entries {tuple(entries.shape)} do not fit q {tuple(q.shape)}: they must be [R, 2, {B}, G, S, {K}] with "
            f"{H} heads a multiple of G"
        )
    if entries.stride(-1) != 1:
        raise ValueError("the channels of an entry must lie side by side: make the cache contiguous in its last axis")
    for name, tensor in by_column.items():
        if tensor is not None and (tensor.shape[0] != B or tensor.stride(-1) != 1):
            raise ValueError(f"{name} {tuple(tensor.shape)} must have {B} rows, and columns that lie side by side")


@register_flop_formula(torch.ops.recurrent_depth_kernels.decode_attention)
def _flops(q: Any, entries: Any, *args: Any, **kwargs: Any) -> int:
    """Scores and weighted values over all S columns of the cache: how many are in use only the device knows."""
    B, H, T, K = q
    return 4 * B * H * T * entries[4] * K
