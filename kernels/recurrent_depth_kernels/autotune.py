"""Read and write the cache of measured launch settings.

The cache is a JSON file with the best settings by (op, width, dtype, device name, triton version), written by `tune`.
It is read on a GPU only; without an entry the table in `tuning` is used. Remove the file to go back to the table.
"""

import json
import os
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
import triton

from recurrent_depth_kernels import targets

Settings = dict[str, int]


def cache_file() -> Path:
    """Return the path of the cache, in the folder RECURRENT_DEPTH_CACHE or the user's cache folder."""
    root = os.environ.get("RECURRENT_DEPTH_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "recurrent-depth"
    return base / "kernels.json"


def key(op: str, width: int, dtype: torch.dtype, device_name: str) -> str:
    return f"{op}|{width}|{str(dtype).removeprefix('torch.')}|{device_name}|triton {triton.__version__}"


def measured(op: str, width: int, dtype: torch.dtype, device: torch.device) -> Settings:
    """Return the settings measured for this op on this GPU; empty if there are none."""
    name = targets.device_name(device)
    folder = os.environ.get("RECURRENT_DEPTH_CACHE") or os.environ.get("XDG_CACHE_HOME")
    return {} if name is None else _measured(op, width, dtype, name, folder)


@lru_cache
def _measured(op: str, width: int, dtype: torch.dtype, device_name: str, folder: str | None) -> Settings:
    """Return what `measured` does; kept, because it is asked for at every launch."""
    return read(cache_file()).get(key(op, width, dtype, device_name), {})


def read(path: Path) -> dict[str, Settings]:
    """Return the entries of a cache file; empty if the file does not exist."""
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text())
    except json.JSONDecodeError as fault:
        raise ValueError(f"{path} is not JSON ({fault}); remove it, and tune again if needed") from fault
    return entries["settings"]


def write(path: Path, entries: dict[str, Settings]) -> None:
    """Add entries to a cache file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = {"settings": read(path) | entries}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(merged, file, indent=1, sort_keys=True)
    Path(file.name).replace(path)
    _measured.cache_clear()


def best(candidates: list[Settings], seconds: Callable[[Settings], float]) -> tuple[Settings, float]:
    """Return the fastest candidate and its time.

    Args:
        seconds: measures a candidate; raises if it does not compile or launch.
    """
    times = []
    faults = []
    for candidate in candidates:
        try:
            times.append((seconds(candidate), candidate))
        except (RuntimeError, triton.CompilationError, triton.runtime.errors.OutOfResources) as fault:
            faults.append(f"{candidate}: {fault}")
    if not times:
        raise RuntimeError("no configuration ran: " + "; ".join(faults))
    time, chosen = min(times, key=lambda pair: pair[0])
    return chosen, time
