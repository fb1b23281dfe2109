"""Speed, utilisation, memory and remaining time of a run, and the line on the terminal that shows them."""

import resource
import time
from datetime import timedelta

import torch

from recurrent_depth.devices import choose_dtype
from recurrent_depth.model.flops import peak_of
from recurrent_depth.training.config import RuntimeConfig
from recurrent_depth.training.parallel import Ranks

_SUMS = ("tokens", "flops", "useful_flops", "data_seconds")


class Speed:
    """Sums over the training steps since the last report, and rates from them. Validation and saving do not count.

    Args:
        device: whose peak memory is reported.
        peak: FLOP/s of all ranks together, for MFU and HFU; None if it is not known.
    """

    def __init__(self, device: torch.device, peak: float | None) -> None:
        self.device, self.peak = device, peak
        self.steps_done, self.start = 0, time.perf_counter()
        self._reset()

    def _reset(self) -> None:
        self.sums, self.count, self.seconds = dict.fromkeys(_SUMS, 0.0), 0, 0.0

    def add(self, seconds: float, record: dict[str, float]) -> None:
        """Add a training step."""
        self.steps_done += 1
        self.count += 1
        self.seconds += seconds
        for name in _SUMS:
            self.sums[name] += record[name]

    def take(self, steps_left: int) -> dict[str, float]:
        """Return the sums and rates since the last call, and start new sums.

        Args:
            steps_left: training steps to the end of the run, for the ETA.

        Returns:
            Sums: tokens, flops (executed), useful_flops (without recomputation), seconds, data_seconds. Rates:
            step_seconds, tokens_per_second, flops_per_second, and mfu and hfu where the peak is known. Then
            peak_memory_bytes of this process since its start, and eta_seconds, which includes validation and saving.
        """
        seconds = max(self.seconds, 1e-9)
        record = {
            **self.sums,
            "seconds": self.seconds,
            "step_seconds": seconds / max(self.count, 1),
            "tokens_per_second": self.sums["tokens"] / seconds,
            "flops_per_second": self.sums["flops"] / seconds,
        }
        if self.peak is not None:
            record["mfu"] = self.sums["useful_flops"] / seconds / self.peak
            record["hfu"] = self.sums["flops"] / seconds / self.peak
        record["peak_memory_bytes"] = float(peak_memory(self.device))
        record["eta_seconds"] = (time.perf_counter() - self.start) / max(self.steps_done, 1) * steps_left
        self._reset()
        return record


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes of this process: of torch's allocator on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # in KiB on Linux


def peak_of_ranks(runtime: RuntimeConfig, ranks: Ranks) -> float | None:
    """Return the dense bfloat16 peak of all ranks in FLOP/s; None in float32, on a CPU, or on an unknown GPU."""
    if ranks.device.type != "cuda" or choose_dtype(runtime.dtype, ranks.device) != torch.bfloat16:
        return None
    peak = peak_of(torch.cuda.get_device_name(ranks.device))
    return None if peak is None else peak * ranks.world_size


def status_line(record: dict[str, float]) -> str:
    """Return the numbers of a report that a user watches."""
    parts = [
        f"loss {record['loss']:.4f}",
        f"lr {record['lr']:.2e}",
        f"gradient {record['gradient_norm']:.2f}",
        f"depth {record['num_steps']:.0f}",
        f"{record['tokens_per_second']:,.0f} tok/s",
        f"step {record['step_seconds']:.3g} s (data {record['data_seconds'] / max(record['seconds'], 1e-9):.0%})",
    ]
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.1%}, HFU {record['hfu']:.1%}")
    parts.append(f"peak {record['peak_memory_bytes'] / 1e9:.2f} GB")
    parts.append(f"ETA {timedelta(seconds=round(record['eta_seconds']))}")
    return "  ".join(parts)
