"""The element-wise operations of a block in torch, and the choice between them and the Triton kernels.

A module holds an `Ops`, set by `use_ops`, and does not know which implementation it calls. Sums are
accumulated in fp32. In bfloat16 the torch functions round after every operation, as eager torch does, and the kernels
once; with `released_rounding` the norms also round before the weight, as the released code does (in fp32 all are the
same).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurrent_depth.model.config import Kernels
from recurrent_depth.model.random import truncated_normal


def rms_norm(x: Tensor, weight: Tensor, eps: float, released_rounding: bool = False) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) * weight for x [..., D] and weight [D], computed in fp32 (or fp64)."""
    h = x if x.dtype == torch.float64 else x.float()
    normal = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if released_rounding:
        normal = normal.to(x.dtype)
    return (normal * weight).to(x.dtype)


def add_norm(residual: Tensor, branch: Tensor, weight: Tensor, eps: float, released_rounding: bool = False) -> Tensor:
    """Return rms_norm(residual + branch), the norm after a residual sum (arXiv 2502.05171, section 3.2)."""
    return rms_norm(residual + branch, weight, eps, released_rounding)


def bias_rope(
    qkv: Tensor, qk_bias: Tensor | None, cos: Tensor, sin: Tensor, n_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a projection into q, k and v, add the bias of q and k, and rotate their interleaved pairs.

    Written as p*cos + flip(p)*sin, which a compiler fuses into one kernel.

    Args:
        qkv: [B, T, (H + 2 G) K]: H query heads, G key heads, G value heads.
        qk_bias: [2, 1, H, K] with G = H, or None.
        cos, sin: [B or 1, T, K] in fp32; `sin` carries the sign of its pair (-, +, -, +, ...).

    Returns:
        q [B, H, T, K]; k and v [B, G, T, K].
    """
    heads = qkv.unflatten(-1, (-1, cos.shape[-1]))  # [B, T, H + 2 G, K]
    groups = (heads.shape[2] - n_heads) // 2
    qk, v = heads.split([n_heads + groups, groups], dim=2)
    if qk_bias is not None:
        qk = qk + qk_bias.flatten(0, 2)
    # Both at once: each of these small operations costs more in calls than in work when a single token is decoded.
    q, k = _rotate(qk, cos[:, :, None], sin[:, :, None]).split([n_heads, groups], dim=2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _rotate(p: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    flipped = p.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (p * cos + flipped * sin).to(p.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(first half) * second half of gate_up [..., 2 I]: [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rope_into_cache(
    qkv: Tensor, q_bias: Tensor | None, k_bias: Tensor | None, cos: Tensor, sin: Tensor, entries: Tensor,
    steps: Tensor, columns: Tensor, active: Tensor, n_heads: int,
) -> Tensor:  # fmt: skip
    """Apply `bias_rope` to new tokens: return q [B, H, T, K] and store k, v in the cache, without host synchronisation.

    Args:
        q_bias, k_bias: [H, K], or None.
        entries: [R, 2, B, G, S, K], a layer's part of a cache with a budget of R iterations; changed in place.
        steps: [B], the iteration of each row; its tokens go to place steps mod R.
        columns: [B], the column of each row's first new token.
        active: [B, T], whether k, v of a token are stored.
    """
    bias = None if q_bias is None or k_bias is None else torch.stack([q_bias, k_bias])[:, None]
    q, k, v = bias_rope(qkv, bias, cos, sin, n_heads)
    rows = torch.arange(len(qkv), device=qkv.device)
    places = steps % len(entries)
    for t in range(qkv.shape[1]):
        new = torch.stack([k[:, :, t], v[:, :, t]], dim=1)  # [B, 2, G, K]
        at = (places, slice(None), rows, slice(None), columns + t)
        entries[at] = torch.where(active[:, t, None, None, None], new, entries[at])
    return q


def read_place(steps: Tensor, depths: Tensor, budget: int, released: bool = False) -> Tensor:
    """Return the place at which an iteration reads a token in a cache that keeps `budget` iterations.

    Iteration i writes place i mod b (arXiv 2502.05171, section 6.2). A token that stopped after d iterations is read at
    min(i, d - 1), its last iteration if it stopped before i: at place min(i, d - 1) mod b. The released code reads
    place i mod b if the token has written it, min(i mod b, d - 1). Both rules agree without a budget, with a budget of
    one, and where every token takes all iterations.

    Args:
        steps: the iteration i that reads, from 0; broadcasts with `depths`.
        depths: the iterations d that a token took.
        budget: the iterations b that the cache keeps.
        released: use the rule of the released code.
    """
    if released:
        return torch.minimum(steps % budget, depths - 1)
    return torch.minimum(steps, depths - 1) % budget


def decode_attention(
    q: Tensor, entries: Tensor, depths: Tensor, lanes: Tensor | None, starts: Tensor, lengths: Tensor, steps: Tensor,
    released: bool,
) -> Tensor:  # fmt: skip
    """Compute attention of new tokens over a cache, whose entries are read by the rule of `read_place`.

    Copies the entries it reads if R is above 1; the kernel reads them in place.

    Args:
        q: [N, H, T, K], the queries of the last T of each row's columns.
        entries: [R, 2, B, G, S, K], a layer's part of the cache.
        depths: [B, S], the iterations each token took.
        lanes: [N], the lane of the cache that each row reads; None: row n reads lane n.
        starts, lengths: [N], the first column of each row, and its number of columns.
        steps: [N], the iteration of each row, from 0.
    """
    T, S = q.shape[2], entries.shape[4]
    column = torch.arange(S, device=q.device)
    if len(entries) == 1:
        keys, values = entries[0] if lanes is None else entries[0][:, lanes]  # [N, G, S, K]
    else:
        row = torch.arange(len(q), device=q.device) if lanes is None else lanes
        places = read_place(steps[:, None], depths[row, :S], len(entries), released)  # [N, S]
        keys, values = entries[places, :, row[:, None], :, column].permute(2, 0, 3, 1, 4)
    own = lengths[:, None, None] - T + torch.arange(T, device=q.device)[:, None]  # [N, T, 1]
    seen = (column <= own) & (column >= starts[:, None, None])
    return F.scaled_dot_product_attention(q, keys, values, seen[:, None], enable_gqa=q.shape[1] != keys.shape[1])


@dataclass(frozen=True)
class Ops:
    """One implementation of the operations that a block calls, and of the noise of an initial state."""

    rms_norm: Callable[..., Tensor] = rms_norm
    add_norm: Callable[..., Tensor] = add_norm
    bias_rope: Callable[..., tuple[Tensor, Tensor, Tensor]] = bias_rope
    swiglu: Callable[[Tensor], Tensor] = swiglu
    truncated_normal: Callable[..., Tensor] = truncated_normal
    rope_into_cache: Callable[..., Tensor] = rope_into_cache
    decode_attention: Callable[..., Tensor] = decode_attention

    @property
    def reads_in_place(self) -> bool:
        """Whether `decode_attention` reads the cache in place, without copying entries."""
        return self.decode_attention is not decode_attention


TORCH_OPS = Ops()


def choose_ops(kernels: Kernels, device: torch.device, released_rounding: bool = False) -> Ops:
    """Return the implementation for tensors on `device`. `auto` on a GPU without Triton warns and uses torch.

    Raises:
        ValueError: if `kernels` is `triton` and Triton cannot run there.
    """
    if kernels == "torch" or (kernels == "auto" and device.type != "cuda"):
        return _rounding(Ops(), released_rounding)
    try:
        import recurrent_depth_kernels as fused
    except ImportError as missing:
        advice = f"the Triton kernels cannot be imported ({missing}); pip install triton, or set kernels: torch"
        if kernels == "triton":
            raise ValueError(advice) from missing
        warnings.warn(f"kernels: auto runs torch's operations, because {advice}", stacklevel=2)
        return _rounding(Ops(), released_rounding)
    if device.type != "cuda" and not fused.INTERPRETED:
        raise ValueError(
            f"kernels: triton needs a CUDA or ROCm device, but the model is on {device.type}; set kernels: auto or "
            "torch (for tests on a CPU, set TRITON_INTERPRET=1 before the process starts)"
        )
    return _rounding(Ops(**{field.name: getattr(fused, field.name) for field in fields(Ops)}), released_rounding)


def _rounding(ops: Ops, released: bool) -> Ops:
    if not released:
        return ops
    return replace(
        ops,
        rms_norm=partial(ops.rms_norm, released_rounding=True),
        add_norm=partial(ops.add_norm, released_rounding=True),
    )


def use_ops(model: nn.Module, ops: Ops) -> None:
    """Set the implementation of every module of a model."""
    for module in model.modules():
        if isinstance(getattr(module, "ops", None), Ops):
            setattr(module, "ops", ops)  # noqa: B010 (a Module's attributes have no types)
