"""Register ops with torch, for compiled and for interpreted kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recurrent_depth_kernels.launch import INTERPRETED, skipped


def op(function: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Any:
    """Register `function` as torch.ops.recurrent_depth_kernels.NAME and return the op, callable like the function.

    On a GPU `triton_op` makes the kernels visible to torch.compile. Interpreted kernels cannot be traced: there the op
    is opaque, and its output shapes are inferred by running the function with launches skipped.

    Args:
        mutates: names of the arguments that the function writes to.
    """
    name = f"recurrent_depth_kernels::{function.__name__}"
    if not INTERPRETED:
        return torch.library.triton_op(name, function, mutates_args=mutates)
    registered = torch.library.custom_op(name, function, mutates_args=mutates)

    def shapes_alone(*args: Any, **kwargs: Any) -> Any:
        with skipped():
            return function(*args, **kwargs)

    registered.register_fake(shapes_alone)
    return registered


def refuse_fp64(x: Tensor, name: str) -> None:
    """Raise for float64 inputs: the kernels compute in fp32 and would silently lose precision."""
    if x.dtype == torch.float64:
        raise ValueError(f"the kernel {name} computes in fp32 and got float64; use kernels: torch for float64")
