"""The GPU architecture that a launch is configured for."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx90a", "gfx942", "gfx950")
"""The architectures of A100, H100/H200, B200, MI250X, MI300X, MI350X, in the tuning table and the compilation check."""

_PROGRAMS = 128  # processors of an assumed GPU
_assumed: ContextVar[str | None] = ContextVar("assumed", default=None)


@contextmanager
def assumed(arch: str) -> Iterator[None]:
    """Configure the launches inside for `arch`, independent of this machine."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"architecture {arch} is not one of {', '.join(ARCHITECTURES)}")
    token = _assumed.set(arch)
    try:
        yield
    finally:
        _assumed.reset(token)


def architecture(device: torch.device) -> str:
    """Return the architecture for `device`: an unknown GPU uses the oldest of its vendor, the interpreter sm_90."""
    arch = _assumed.get()
    if arch is not None:
        return arch
    return _of_device(device) if device.type == "cuda" else "sm_90"


@lru_cache
def _of_device(device: torch.device) -> str:
    if torch.version.hip:
        found = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return found if found in ARCHITECTURES else "gfx90a"
    major, minor = torch.cuda.get_device_capability(device)
    found = f"sm_{major}{minor}"
    return found if found in ARCHITECTURES else "sm_80"


def device_name(device: torch.device) -> str | None:
    """Return the name of the GPU; None without a GPU."""
    if _assumed.get() is not None or device.type != "cuda":
        return None
    return _name(device)


@lru_cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def is_hip(arch: str) -> bool:
    return arch.startswith("gfx")


def warp_size(arch: str) -> int:
    """Return the threads of a warp (a wavefront on AMD)."""
    return 64 if is_hip(arch) else 32


def processors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors or compute units; 2 in the interpreter."""
    if _assumed.get() is not None or device.type == "meta":
        return _PROGRAMS
    return _count(device) if device.type == "cuda" else 2


@lru_cache
def _count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
