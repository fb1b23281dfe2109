"""Every launch the kernels make at the shape of the 3.5B model: what a check has to compile, and a tuner to time."""

import torch
from torch import Tensor

from recurrent_depth_kernels import norm
from recurrent_depth_kernels.launch import Launch, planned

WIDTH, HEADS, INNER = 5280, 55, 17_920
"""Of the published 3.5B model (arXiv 2502.05171)."""


def launches(arch: str, rows: int = 4096, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """The launches on a GPU of `arch` (see `targets.ARCHITECTURES`), forward and backward; works without a GPU."""
    with planned(arch) as found:
        _norms(rows, dtype)
    return found


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def _norms(rows: int, dtype: torch.dtype) -> None:
    x, y, weight = _meta(rows, WIDTH, dtype=dtype), _meta(rows, WIDTH, dtype=dtype), _meta(WIDTH, dtype=dtype)
    norm.rms_norm(x, weight, 1e-6).sum().backward()
    norm.add_norm(x, y, weight, 1e-6).sum().backward()
    a, b = norm.add_norm_norm(x, y, weight, weight, 1e-6)
    (a + b).sum().backward()
