"""Attention of new tokens over a cache with a budget of iterations, read in place, split over keys (flash-decoding).

`read_place` gives the entry of a cached token that an iteration reads. Iterations and depths are on the device, so no
entry is gathered and there is no host synchronisation.

Shapes: N rows of queries, T new tokens of a row, B lanes of the cache, S columns, H query heads, G key heads, K head
size, R places of the budget.
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
def read_place(step, depth, BUDGET: tl.constexpr, RELEASED: tl.constexpr):
    """Return the place at which iteration `step` reads a token of `depth` iterations (recurrent_depth.model.ops)."""
    return tl.minimum(step % BUDGET, depth - 1) if RELEASED else tl.minimum(step, depth - 1) % BUDGET


@triton.jit
def _load_depths(depths, column, end, BUDGET: tl.constexpr):
    """Return the depths of the tokens at these columns; with a budget of one they are not needed."""
    return tl.load(depths + column, mask=column < end, other=1) if BUDGET > 1 else column.to(tl.int64)


@triton.jit
def _offsets(column, depth, step, stride_place, stride_s, BUDGET: tl.constexpr, RELEASED: tl.constexpr):
    """Return the offsets of the entries that an iteration reads at these columns."""
    at = column.to(tl.int64) * stride_s
    return at + read_place(step, depth, BUDGET, RELEASED) * stride_place if BUDGET > 1 else at


@triton.jit
def attend_one(
    q, entries, depths, lanes, starts, lengths, steps, partial, peak, total, scale,
    stride_qb, stride_qh, stride_place, stride_kv, stride_eb, stride_eh, stride_s, stride_db, n_heads,
    K: tl.constexpr, BUDGET: tl.constexpr, RELEASED: tl.constexpr, HAS_LANES: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Attend with one query per key head, without matrix products. A program reads one split of one (row, head).

    Each of the BLOCK_S threads of a block has its own softmax; they are combined after the loop.
    """
    pair, split = tl.program_id(0), tl.program_id(1)
    b, h = (pair // n_heads).to(tl.int64), pair % n_heads
    lane, first = tl.load(lanes + b).to(tl.int64) if HAS_LANES else b, tl.load(starts + b)
    length, step = tl.load(lengths + b), tl.load(steps + b)
    chunk = tl.cdiv(tl.cdiv(length - first, SPLITS), BLOCK_S) * BLOCK_S
    channel = tl.arange(0, BLOCK_K)
    real = channel < K
    query = tl.load(q + b * stride_qb + h * stride_qh + channel, mask=real, other=0).to(ACCUMULATE) * scale
    base = entries + lane * stride_eb + h * stride_eh

    m = tl.full((BLOCK_S,), LOWEST, ACCUMULATE)
    z = tl.zeros((BLOCK_S,), ACCUMULATE)
    y = tl.zeros((BLOCK_S, BLOCK_K), ACCUMULATE)
    begin, end = first + split * chunk, tl.minimum(first + split * chunk + chunk, length)
    depths += lane * stride_db
    depth = _load_depths(depths, begin + tl.arange(0, BLOCK_S), end, BUDGET)
    for start in range(begin, end, BLOCK_S):
        column = start + tl.arange(0, BLOCK_S)
        held = column < end
        at = _offsets(column, depth, step, stride_place, stride_s, BUDGET, RELEASED)
        depth = _load_depths(depths, column + BLOCK_S, end, BUDGET)  # of the next block, while this one is computed
        pointer, wanted = base + at[:, None] + channel[None, :], held[:, None] & real[None, :]
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
    q, entries, depths, lanes, starts, lengths, steps, partial, peak, total, scale,
    stride_qb, stride_qh, stride_qt, stride_place, stride_kv, stride_eb, stride_eh, stride_s, stride_db, n_heads, T,
    K: tl.constexpr, GROUP: tl.constexpr, BUDGET: tl.constexpr, RELEASED: tl.constexpr, HAS_LANES: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Attend with several queries per key head (T tokens times GROUP heads) in one matrix product, padded to ROWS."""
    pair, split = tl.program_id(0), tl.program_id(1)
    b, h = (pair // n_heads).to(tl.int64), pair % n_heads
    lane, first = tl.load(lanes + b).to(tl.int64) if HAS_LANES else b, tl.load(starts + b)
    length, step = tl.load(lengths + b), tl.load(steps + b)
    chunk = tl.cdiv(tl.cdiv(length - first, SPLITS), BLOCK_S) * BLOCK_S
    channel = tl.arange(0, BLOCK_K)
    real = channel < K
    row = tl.arange(0, ROWS)
    t = row // GROUP
    head = h * GROUP + row % GROUP
    query = tl.load(
        q + b * stride_qb + (head * stride_qh + t * stride_qt)[:, None] + channel[None, :],
        mask=(t < T)[:, None] & real[None, :], other=0,
    )  # fmt: skip
    base = entries + lane * stride_eb + h * stride_eh
    own = length - T + t  # the column of each query's own token

    m = tl.full((ROWS,), LOWEST, ACCUMULATE)
    z = tl.zeros((ROWS,), ACCUMULATE)
    y = tl.zeros((ROWS, BLOCK_K), ACCUMULATE)
    begin, end = first + split * chunk, tl.minimum(first + split * chunk + chunk, length)
    depths += lane * stride_db
    depth = _load_depths(depths, begin + tl.arange(0, BLOCK_S), end, BUDGET)
    for start in range(begin, end, BLOCK_S):
        column = start + tl.arange(0, BLOCK_S)
        held = column < end
        at = _offsets(column, depth, step, stride_place, stride_s, BUDGET, RELEASED)
        depth = _load_depths(depths, column + BLOCK_S, end, BUDGET)  # of the next block, while this one is computed
        pointer, wanted = base + at[:, None] + channel[None, :], held[:, None] & real[None, :]
        k = tl.load(pointer, mask=wanted, other=0)
        v = tl.load(pointer + stride_kv, mask=wanted, other=0)
        score = tl.dot(query, tl.trans(k), input_precision="ieee", out_dtype=ACCUMULATE) * scale
        seen = held[None, :] & (column[None, :] <= own[:, None])
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
    """Combine the splits of one query by a weighted mean."""
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
    q: Tensor, entries: Tensor, depths: Tensor, lanes: Tensor | None, starts: Tensor, lengths: Tensor, steps: Tensor,
    released: bool,
) -> Tensor:  # fmt: skip
    """Return softmax(q kᵀ / sqrt(K)) v over the columns a token may see. Forward only.

    Args:
        q: [N, H, T, K], the queries of the last T of each row's columns.
        entries: [R, 2, B, G, S, K], keys and values of one layer; H is a multiple of G. Only the last axis must be
            contiguous.
        depths: [B, S], iterations each token has taken, at least 1; for a token that is still iterating, at least the
            current iteration + 1.
        lanes: [N], the lane of the cache that each row reads; None: row n reads lane n.
        starts, lengths: [N], the first column a row sees, and its columns in use, the T new ones included.
        steps: [N], the iteration of each row, from 0.
        released: read by the rule of the released code.

    Returns:
        [N, H, T, K] in q's dtype, accumulated in fp32 (fp64 for fp64).
    """
    N, H, T, K = q.shape
    R, _, _, G, S, _ = entries.shape
    _check(q, entries, depths)
    group = H // G
    kernel, name = (attend_one, "attend_one") if group * T == 1 else (attend_many, "attend_many")
    chosen = settings(name, K, q.dtype, q.device)
    block = max(chosen["block"] * 2 // q.element_size(), 16)  # the table is for two-byte elements
    splits = splits_for(N * G, S, block, chosen["waves"] * processors(q.device))
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    q = q if q.stride(-1) == 1 else q.contiguous()
    out = torch.empty((N, H, T, K), dtype=q.dtype, device=q.device)
    partial = torch.empty((N * H * T, splits, K), dtype=accumulate, device=q.device)
    peak = torch.empty((N * H * T, splits), dtype=accumulate, device=q.device)
    total = torch.empty_like(peak)
    parts = {"partial": partial, "peak": peak, "total": total}
    arguments: dict[str, Any] = {
        "q": q, "entries": entries, "depths": depths, "lanes": starts if lanes is None else lanes, "starts": starts,
        "lengths": lengths, "steps": steps, **parts, "scale": K**-0.5, "stride_qb": q.stride(0),
        "stride_qh": q.stride(1), "stride_place": entries.stride(0), "stride_kv": entries.stride(1),
        "stride_eb": entries.stride(2), "stride_eh": entries.stride(3), "stride_s": entries.stride(4),
        "stride_db": depths.stride(0), "n_heads": G,
    }  # fmt: skip
    constants: dict[str, Any] = {
        "K": K, "BUDGET": R, "RELEASED": released, "HAS_LANES": lanes is not None, "SPLITS": splits, "BLOCK_S": block,
        "BLOCK_K": triton.next_power_of_2(K), "ACCUMULATE": tl.float64 if q.dtype == torch.float64 else tl.float32,
    }  # fmt: skip
    if kernel is attend_many:
        arguments |= {"stride_qt": q.stride(2), "T": T}
        constants |= {"GROUP": group, "ROWS": max(16, triton.next_power_of_2(group * T))}
    Launch(kernel, (N * G, splits), arguments, constants, chosen["num_warps"], 1).run()
    joined = {name: constants[name] for name in ("K", "SPLITS", "BLOCK_K")}
    Launch(join_splits, (N * H * T,), {**parts, "out": out}, joined, 4, 1).run()
    return out


def splits_for(pairs: int, columns: int, block: int, programs: int) -> int:
    """Return the number of splits of the columns, a power of two: about `programs` in all, no split below one block."""
    most = max(1, min(programs // pairs, triton.cdiv(columns, block), 16))
    return 1 << (most.bit_length() - 1)


def _check(q: Tensor, entries: Tensor, depths: Tensor) -> None:
    H, K = q.shape[1], q.shape[3]
    _, two, lanes, G, S, size = entries.shape
    if (two, size) != (2, K) or H % G:
        raise ValueError(
            f"entries {tuple(entries.shape)} do not fit q {tuple(q.shape)}: they must be [R, 2, B, G, S, {K}], where "
            f"the {H} query heads are a multiple of G"
        )
    if entries.stride(-1) != 1:
        raise ValueError(
            f"the last axis of entries has stride {entries.stride(-1)}; it must be 1: make the cache contiguous"
        )
    if depths.shape[0] != lanes or depths.shape[1] < S or depths.stride(-1) != 1:
        raise ValueError(
            f"depths are {tuple(depths.shape)} with stride {depths.stride(-1)}; they must be [{lanes}, {S} or more] "
            "with stride 1"
        )


@register_flop_formula(torch.ops.recurrent_depth_kernels.decode_attention)
def _flops(q: Any, entries: Any, *args: Any, **kwargs: Any) -> int:
    """Return the FLOPs over all S columns of the cache; the number of columns in use is known only on the device."""
    N, H, T, K = q
    return 4 * N * H * T * entries[4] * K
