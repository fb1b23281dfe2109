"""Accelerators by their vendors' data sheets. Bandwidths are of one direction, in bytes per second and GPU."""

from dataclasses import dataclass

from recurrent_depth.model.flops import PEAK_FLOPS
from recurrent_depth.planning.config import DeviceName

GB = 10**9

RESERVE = 0.08
"""Share of a card left free: the CUDA context, cuBLAS workspaces, fragmentation. An allowance, not a measurement."""

LINK_EFFICIENCY = 0.7
"""Share of a link's bandwidth that large collectives are assumed to reach."""


@dataclass(frozen=True)
class Device:
    """One accelerator in the node it is usually sold in.

    Attributes:
        memory: bytes.
        peak: dense bfloat16 operations per second.
        link: bandwidth to the other GPUs of the node.
        network: bandwidth to other nodes, this GPU's share.
        per_node: GPUs in a node.
    """

    memory: float
    peak: float
    link: float
    network: float
    per_node: int = 8


DEVICES: dict[DeviceName, Device] = {
    "a100": Device(80 * GB, PEAK_FLOPS["A100"], 300 * GB, 25 * GB),  # NVLink 3, 200 Gb/s a GPU
    "h100": Device(80 * GB, PEAK_FLOPS["H100"], 450 * GB, 50 * GB),  # NVLink 4, 400 Gb/s a GPU
    "h200": Device(141 * GB, PEAK_FLOPS["H200"], 450 * GB, 50 * GB),
    "mi300x": Device(192 * GB, PEAK_FLOPS["MI300X"], 448 * GB, 50 * GB),  # 7 Infinity Fabric links of 64 GB/s
    "mi250x": Device(64 * GB, PEAK_FLOPS["MI250X"], 50 * GB, 12.5 * GB),  # one die; Frontier: 4 x 200 Gb/s for 8 dies
}
