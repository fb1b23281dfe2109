"""Stateless random numbers: each is a function of its key and counter, not of earlier draws.

Philox4x32-10 (Salmon et al., 2011) maps a key and a counter to four 32-bit words. The counter is (channel, position,
row, step), so that the noise is the same on any rank, in any batch layout, and in a resumed run.
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

STATE_STREAM = 1  # initial states
DEPTH_STREAM = 2  # iterations of a micro-step
SAMPLE_STREAM = 3  # tokens
NOTE_STREAM = 4  # positions of a task's visible notes
THINKING_STREAM = 5  # questions with traces
LENGTH_STREAM = 6  # lengths of a task's rows
READ_STREAM = 7  # iterations whose states an objective reads

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_TRUNCATION = 3.0  # standard deviations
_ERF_BOUND = math.erf(_TRUNCATION / math.sqrt(2))


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Return four words of 32 random bits from four counters: int64 tensors that hold 32-bit words and broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low0, high0 = _multiply(c0, _MULTIPLIERS[0])
        low1, high1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Return the low and high 32 bits of a 32 x 32 bit product. int64 may overflow; all 64 bits are still right."""
    product = a * b
    return product & _MASK, (product >> 32) & _MASK


def uniform(
    rows: Tensor, positions: Tensor, channels: int, *, seed: int, step: int = 0, stream: int = STATE_STREAM
) -> Tensor:
    """Return uniform numbers in (0, 1), a function of (seed, stream, step, row, position, channel).

    The four words of one counter are used for four neighbouring channels.

    Args:
        rows: [B] int64.
        positions: [B or 1, T] int64.

    Returns:
        [B, T, channels] in fp32, on the device of `rows`.
    """
    blocks = torch.arange((channels + 3) // 4, device=positions.device)
    c0 = blocks[None, None, :]
    c1 = (positions & _MASK)[:, :, None]
    c2 = (rows & _MASK)[:, None, None]
    c3 = torch.full((1, 1, 1), step & _MASK, dtype=torch.int64, device=positions.device)
    words = philox((c0, c1, c2, c3), _key(seed, stream))
    shape = torch.broadcast_shapes(*(word.shape for word in words))
    bits = torch.stack([word.expand(shape) for word in words], dim=-1).flatten(-2)[..., :channels]
    return ((bits >> 9).float() + 0.5) * 2.0**-23  # exact in fp32


def truncated_normal(
    rows: Tensor, positions: Tensor, channels: int, *, seed: int, step: int = 0, stream: int = STATE_STREAM
) -> Tensor:
    """Return standard normal numbers truncated at 3 sigma; arguments and shapes as in `uniform`."""
    u = uniform(rows, positions, channels, seed=seed, step=step, stream=stream)
    return torch.erfinv((2 * u - 1) * _ERF_BOUND) * math.sqrt(2)


def _key(seed: int, stream: int) -> tuple[int, int]:
    return seed & _MASK, ((seed >> 32) & _MASK) ^ stream


def generator(seed: int, stream: int, *counters: int) -> np.random.Generator:
    """Return a numpy generator that depends on (seed, stream, counters) only, for draws on the host."""
    digest = hashlib.sha256(repr((seed, stream, *counters)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def named_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator for the initial values of one parameter, the same on every rank and at any world size."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
