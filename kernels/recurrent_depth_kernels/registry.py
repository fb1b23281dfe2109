"""How an op becomes known to torch: the one place that asks whether kernels are compiled or interpreted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recurrent_depth_kernels.launch import INTERPRETED, skipped


def op(function: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Any:
    """Register `function` as torch.ops.recurrent_depth_kernels.NAME; returns the op, callable like the function.

    `mutates` names the arguments that it writes to.

    On a GPU `triton_op` lets torch.compile see the kernels. Interpreted kernels cannot be traced, so there the op is
    opaque, and its shapes come from its own body with launches left out.
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
    """The kernels compute in fp32: what would lose precision silently is an error."""
    if x.dtype == torch.float64:
        raise ValueError(f"the kernel {name} computes in fp32 and got float64; use kernels: torch for float64")
