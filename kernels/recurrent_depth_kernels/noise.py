"""Noise of initial states: normal numbers truncated at 3 sigma.

Each number is a function of (seed, stream, step, row, position, channel) as in recurrent_depth/model/random.py:
Philox4x32-10 with counter (channel / 4, position, row, step) and key (seed, stream). Random bits are the same on every
device; normal numbers agree to 4e-6 (3.6e-6 measured on an H200, whose logarithm is approximate).

Shapes: B batch, T tokens, D channels.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from recurrent_depth_kernels.launch import Launch
from recurrent_depth_kernels.registry import op
from recurrent_depth_kernels.tuning import settings

STATE_STREAM = 1
ERF_BOUND = tl.constexpr(math.erf(3 / math.sqrt(2)))


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Return four words of random bits from four counters and two keys in uint32 (Philox4x32-10)."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def inverse_normal(x):
    """Return sqrt(2) erfinv(x) for |x| <= erf(3 / sqrt(2)) to 5e-7: x times a fitted polynomial in -log(1 - x²)."""
    t = -tl.log((1 - x) * (1 + x)) - 2.61136997
    p = 2.22243641e-08 - 1.14096864e-08 * t
    p = 6.70275107e-07 + p * t
    p = -4.39320783e-06 + p * t
    p = -1.00653802e-05 + p * t
    p = 3.04066181e-04 + p * t
    p = -1.63516711e-03 + p * t
    p = -6.47684127e-03 + p * t
    p = 3.47421962e-01 + p * t
    return x * (2.16208389 + p * t)


@triton.jit(do_not_specialize=["step", "key_0", "key_1"])
def normal_noise(rows_ptr, positions_ptr, out_ptr, tokens, channels, positions_batch, step, key_0, key_1,
                            BLOCK: tl.constexpr):  # fmt: skip
    """Compute BLOCK channels of one token; the four words of a counter are used for four neighbouring channels."""
    token = tl.program_id(0).to(tl.int64)
    b, t = token // tokens, token % tokens
    counter = tl.program_id(1) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    zero = tl.zeros((BLOCK // 4,), tl.uint32)
    position = tl.load(positions_ptr + b * positions_batch + t).to(tl.uint32)
    row = tl.load(rows_ptr + b).to(tl.uint32)
    w0, w1, w2, w3 = philox(
        counter.to(tl.uint32), zero + position, zero + row, zero + step, zero + key_0, zero + key_1
    )  # fmt: skip
    bits = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))
    u = ((bits >> 9).to(tl.float32) + 0.5) * (2.0**-23)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = inverse_normal((2 * u - 1) * ERF_BOUND)
    tl.store(out_ptr + token * channels + channel, value, mask=channel < channels)


@op
def truncated_normal_rows(
    rows: Tensor, positions: Tensor, channels: int, step: int, key_0: int, key_1: int
) -> Tensor:  # fmt: skip
    """Return noise [B, T, channels] in fp32; step and keys are signed 32-bit integers."""
    B, T = rows.shape[0], positions.shape[1]
    out = torch.empty((B, T, channels), dtype=torch.float32, device=positions.device)
    chosen = settings("noise", channels, out.dtype, out.device)
    arguments = {
        "rows_ptr": rows.contiguous(), "positions_ptr": positions.contiguous(), "out_ptr": out, "tokens": T,
        "channels": channels, "positions_batch": 0 if positions.shape[0] == 1 else T, "step": step, "key_0": key_0,
        "key_1": key_1,
    }  # fmt: skip
    grid = (B * T, triton.cdiv(channels, chosen["block"]))
    constants = {"BLOCK": chosen["block"]}
    Launch(normal_noise, grid, arguments, constants, chosen["num_warps"], 1).run()
    return out


def truncated_normal(
    rows: Tensor, positions: Tensor, channels: int, *, seed: int, step: int = 0, stream: int = STATE_STREAM
) -> Tensor:
    """Return standard normal numbers truncated at 3 sigma, [B, T, channels] in fp32.

    Args:
        rows: [B] int64.
        positions: [B or 1, T] int64.
    """
    keys = _signed(seed), _signed((seed >> 32) ^ stream)
    return truncated_normal_rows(rows, positions, channels, _signed(step), *keys)


def _signed(word: int) -> int:
    """Return the low 32 bits as a signed integer, so that the argument type does not depend on the value."""
    return (word + 2**31) % 2**32 - 2**31
