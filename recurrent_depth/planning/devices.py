"""Accelerators, by their vendors' data sheets. Bandwidths are per GPU and direction, in bytes/s."""

from dataclasses import dataclass

from recurrent_depth.model.flops import PEAK_FLOPS
from recurrent_depth.planning.config import DeviceName

GB = 10**9

RESERVE = 0.08
"""Share of a card's memory left free for the CUDA context, cuBLAS workspaces and fragmentation; not measured."""

LINK_EFFICIENCY = 0.7
"""Share of a link's bandwidth that large collectives are assumed to reach; not measured."""


@dataclass(frozen=True)
class Device:
    """One accelerator in its usual node.

    Attributes:
        memory: bytes.
        peak: dense bfloat16 FLOP/s.
        link: bandwidth to the other GPUs of the node, in bytes/s.
        network: share of one GPU in the bandwidth to other nodes, in bytes/s.
        per_node: GPUs per node.
    """

    memory: float
    peak: float
    link: float
    network: float
    per_node: int = 8


DEVICES: dict[DeviceName, Device] = {
    "a100": Device(80 * GB, PEAK_FLOPS["A100"], 300 * GB, 25 * GB),  # NVLink 3, 200 Gb/s per GPU
    "h100": Device(80 * GB, PEAK_FLOPS["H100"], 450 * GB, 50 * GB),  # NVLink 4, 400 Gb/s per GPU
    "h200": Device(141 * GB, PEAK_FLOPS["H200"], 450 * GB, 50 * GB),
    "mi300x": Device(192 * GB, PEAK_FLOPS["MI300X"], 448 * GB, 50 * GB),  # 7 Infinity Fabric links of 64 GB/s
    "mi250x": Device(64 * GB, PEAK_FLOPS["MI250X"], 50 * GB, 12.5 * GB),  # one die; Frontier: 4 x 200 Gb/s for 8 dies
}
