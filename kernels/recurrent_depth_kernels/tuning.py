"""Launch settings: a table by op and architecture, overridden by the measurements of `tune` on this machine.

Row ops hold a whole row in one program: `elements` is the number of elements per thread, which determines the number of
warps. Column ops split rows into blocks of `block` columns. Decode attention reads `block` cached columns at a time and
starts `waves` programs per processor.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import triton

from recurrent_depth_kernels import autotune, targets

Settings = dict[str, int]

_NVIDIA = ("sm_80", "sm_90", "sm_100")
_AMD = ("gfx90a", "gfx942", "gfx950")


def _table(nvidia: Settings, amd: Settings, **exceptions: Settings) -> dict[str, Settings]:
    rows = dict.fromkeys(_NVIDIA, nvidia) | dict.fromkeys(_AMD, amd)
    return rows | exceptions


TABLE: dict[str, dict[str, Settings]] = {
    "norm": _table({"elements": 16}, {"elements": 16}, sm_90={"elements": 32}, sm_100={"elements": 32}),
    "norm_backward": _table({"elements": 16}, {"elements": 16}, sm_90={"elements": 4}),
    "rope": _table(
        {"block": 1024, "num_warps": 4}, {"block": 2048, "num_warps": 4}, sm_90={"block": 2048, "num_warps": 8}
    ),
    "rope_backward": _table(
        {"block": 1024, "num_warps": 4}, {"block": 2048, "num_warps": 4}, sm_90={"block": 512, "num_warps": 2}
    ),
    "swiglu": _table(
        {"block": 1024, "num_warps": 4}, {"block": 2048, "num_warps": 4}, sm_90={"block": 2048, "num_warps": 4}
    ),
    "noise": _table(
        {"block": 1024, "num_warps": 4}, {"block": 1024, "num_warps": 4}, sm_90={"block": 512, "num_warps": 2}
    ),
    "attend_one": _table({"block": 32, "waves": 4, "num_warps": 4}, {"block": 32, "waves": 4, "num_warps": 4}),
    "attend_many": _table({"block": 32, "waves": 4, "num_warps": 4}, {"block": 32, "waves": 4, "num_warps": 4}),
}
"""sm_90 as `tune` measured on an H200 (it kept the attention's); the others by compilation: 16 bytes per load, no
spills at width 5280."""

_tried: ContextVar[dict[str, Settings]] = ContextVar("tried", default={})  # noqa: B039 (never changed in place)

MAX_WIDTH = 32_768
"""Widest row of a row op, which holds it in registers."""


def settings(op: str, width: int, dtype: torch.dtype, device: torch.device) -> Settings:
    """Return the settings of `op` for rows of `width` columns."""
    chosen = TABLE[op][targets.architecture(device)]
    return chosen | autotune.measured(op, width, dtype, device) | _tried.get().get(op, {})


def row_settings(op: str, width: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Return (block, num_warps) of a row op. The block is the whole row, rounded up to a power of two."""
    if width > MAX_WIDTH:
        raise ValueError(f"rows of {width} columns are wider than {MAX_WIDTH}, the limit of {op}; use kernels: torch")
    block = triton.next_power_of_2(width)
    threads = block // settings(op, width, dtype, device)["elements"]
    warp = targets.warp_size(targets.architecture(device))
    return block, min(max(threads // warp, 1), 1024 // warp)


@contextmanager
def tried(op: str, candidate: Settings) -> Iterator[None]:
    """Use a candidate for launches of `op` inside, instead of the table."""
    token = _tried.set(_tried.get() | {op: candidate})
    try:
        yield
    finally:
        _tried.reset(token)


def candidates(op: str) -> list[Settings]:
    """Return the settings that `tune` tries."""
    if "norm" in op:
        return [{"elements": n} for n in (4, 8, 16, 32)]
    if op.startswith("attend"):
        return [{"block": b, "waves": n, "num_warps": w} for b in (16, 32, 64) for n in (2, 4, 8) for w in (2, 4)]
    return [{"block": b, "num_warps": w} for b in (512, 1024, 2048, 4096) for w in (2, 4, 8)]
