"""A stage of the GPU suite: named measurements, each written to the stage's JSON file as soon as it ends."""

import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import environment
from benchmarks.gpu.suite import LOST_DEVICE
from recurrent_depth.files import write_json


class TimeOver(Exception):
    """The time of the stage is over; the next call of the suite goes on from here."""


class Stage:
    """Run measurements until the time is over, and keep what they return.

    An entry of the file is what a measurement returned, with the seconds it took; `{"failure": traceback}` if it
    failed, and `{"does_not_fit": true}` if the memory of the GPU was too small. A later call repeats failed
    measurements only.

    Args:
        path: the JSON file.
        seconds: time from now after which no measurement is started.
        keep_failed: keep entries of failed measurements, which are run again otherwise.

    Attributes:
        device: the GPU if there is one, else the CPU.
        toy: whether to use sizes at which everything runs on a CPU in seconds.
    """

    def __init__(self, path: Path, seconds: float, keep_failed: bool = False) -> None:
        self.path, self.end = path, time.monotonic() + seconds
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.toy = self.device.type == "cpu"
        old = json.loads(path.read_text()) if path.is_file() else {}
        here = environment()
        before = old.get("environment", here)
        if any(before.get(name) != here[name] for name in ("gpu", "torch", "triton")):
            raise ValueError(f"{path} was measured on another GPU, or with another torch or triton; change --out")
        self.content: dict[str, Any] = {"environment": here, "finished": False, "running": None}
        entries = old.get("entries", {}).items()
        self.entries: dict[str, Any] = {name: e for name, e in entries if keep_failed or "failure" not in e}
        self.content["entries"] = self.entries

    def measure(self, name: str, action: Callable[..., Any], *args: Any) -> Any:
        """Return what `action(*args)` returns, a dictionary, or returned in an earlier call; None if it failed.

        Raises:
            TimeOver: if the time of the stage is over.
        """
        if name in self.entries:
            return self.entries[name] if "failure" not in self.entries[name] else None
        if time.monotonic() > self.end:
            raise TimeOver
        self._write(running=name)
        began = time.monotonic()
        try:
            entry = action(*args) or {}
        except torch.OutOfMemoryError:
            entry = {"does_not_fit": True}
        except Exception:
            entry = {"failure": traceback.format_exc()}
        self.entries[name] = entry | {"wall_seconds": round(time.monotonic() - began, 2)}
        self._write(running=None)
        print(f"{name}: {summary(self.entries[name])}", flush=True)
        if "CUDA error" in entry.get("failure", "") or "HIP error" in entry.get("failure", ""):
            raise SystemExit(LOST_DEVICE)
        free_memory()
        return entry if "failure" not in entry else None

    def finish(self) -> None:
        """Write that all measurements have been run; those that failed are run again by the next call."""
        self.content["finished"] = not any("failure" in entry for entry in self.entries.values())
        self._write(running=None)

    def _write(self, running: str | None) -> None:
        self.content["running"] = running
        write_json(self.path, self.content)

    def seconds(self, action: Callable[[], Any], repeats: int = 20) -> float:
        """Return the median time of an action on the device, in seconds; on a GPU without the time of its launches."""
        return median_seconds(action if self.toy else captured(action), self.device, repeats)


def summary(entry: dict[str, Any]) -> str:
    """Return an entry in one short line."""
    if "failure" in entry:
        return "FAILED: " + entry["failure"].strip().splitlines()[-1]
    if "does_not_fit" in entry:
        return "does not fit"
    return ", ".join(f"{key} {value:.4g}" for key, value in entry.items() if isinstance(value, float))


def median_seconds(action: Callable[[], Any], device: torch.device, repeats: int, warmup: int = 2) -> float:
    """Return the median time of an action; on a GPU by events, with its cache cleared before each run."""
    for _ in range(warmup):
        action()
    if device.type == "cpu":
        return statistics.median(_host_seconds(action) for _ in range(repeats))
    cleared = torch.empty(2**28, dtype=torch.uint8, device=device)  # larger than any L2 cache
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in pairs:
        cleared.zero_()
        start.record()
        action()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


def captured(action: Callable[[], Any]) -> Callable[[], None]:
    """Return the replay of a CUDA graph of an action, in which the host takes no part."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            action()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph.replay


def _host_seconds(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory() -> None:
    """Return the memory that no tensor uses to the GPU."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
