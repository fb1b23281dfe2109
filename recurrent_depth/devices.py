"""Choose the device and dtype of a command."""

from contextlib import AbstractContextManager, nullcontext

import torch


def choose_device(name: str = "auto") -> torch.device:
    """Return the device called `name`: `auto`, `cpu`, `cuda` or `cuda:N`.

    `auto` is a CUDA or ROCm GPU if torch sees one, else the CPU.

    Raises:
        ValueError: if the name is not a device, or torch does not see that GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise ValueError(f"device is {name!r}, but torch sees {found} CUDA or ROCm device(s); use auto or cpu")
    return device


def device_of_process(name: str, local_rank: int) -> torch.device:
    """Return the device called `name` for one of several processes: on GPUs each process takes its own.

    Args:
        name: see `choose_device`.
        local_rank: number of the process on its node.
    """
    device = choose_device(name)
    if device.type != "cuda" or device.index is not None:
        return device
    found = torch.cuda.device_count()
    if local_rank >= found:
        raise ValueError(
            f"this is process {local_rank} of its node, counted from 0, but torch sees {found} CUDA or ROCm device(s); "
            f"start one process per GPU (torchrun --nproc_per_node {found})"
        )
    return torch.device("cuda", local_rank)


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which `device` is the current GPU, on which streams and kernels start; nothing on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype called `name`: `auto` (bfloat16 on a GPU, float32 on a CPU), `float32` or `bfloat16`."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {name!r}; use auto, float32 or bfloat16")
    return getattr(torch, name)
