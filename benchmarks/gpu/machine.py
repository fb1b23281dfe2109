"""Stage `machine`: copy bandwidth and matrix rate, the ceilings of all other numbers."""

import math
from typing import Any

import torch

from benchmarks.gpu.stage import Stage, median_seconds
from recurrent_depth.model.flops import peak_of


def run(stage: Stage) -> None:
    stage.measure("device", device, stage)
    stage.measure("copy", copy, stage)
    stage.measure("matrix product", matrix_product, stage)


def device(stage: Stage) -> dict[str, Any]:
    """Return what torch says about the device."""
    if stage.toy:
        return {"name": "cpu"}
    found = torch.cuda.get_device_properties(stage.device)
    return {
        "name": found.name, "memory_bytes": found.total_memory, "processors": found.multi_processor_count,
        "hip": torch.version.hip, "cuda": torch.version.cuda,
    }  # fmt: skip


def copy(stage: Stage) -> dict[str, float]:
    """Return the bytes per second of a large copy, read and written."""
    source = torch.randn(2**10 if stage.toy else 2**30, device=stage.device)
    target = torch.empty_like(source)
    # Launched, not captured: inside a graph the copy engine does it, which reaches two thirds of the bandwidth (H200).
    seconds = median_seconds(lambda: target.copy_(source), stage.device, repeats=20)
    return {"bytes_per_second": 2 * source.nbytes / seconds}


def matrix_product(stage: Stage) -> dict[str, float]:
    """Return the FLOP/s of a square bfloat16 product of random numbers, and the share of the data sheet's peak."""
    n = 64 if stage.toy else 8192
    a, b = (torch.randn(n, n, device=stage.device, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * n**3 / stage.seconds(lambda: a @ b)
    return {"flops_per_second": rate, "share_of_peak": rate / (peak_flops(stage) or math.nan)}


def peak_flops(stage: Stage) -> float | None:
    """Return the dense bfloat16 peak of the device by its data sheet; None if it is not known."""
    return None if stage.toy else peak_of(torch.cuda.get_device_name(stage.device))
