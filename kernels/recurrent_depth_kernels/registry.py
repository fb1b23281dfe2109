"""Register ops with torch, for compiled and for interpreted kernels."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from recurrent_depth_kernels.launch import INTERPRETED, skipped


class Op:
    """A function that launches kernels, known to torch as torch.ops.recurrent_depth_kernels.NAME.

    torch.compile, dispatch modes (FLOP counters, fake tensors) and tensor subclasses get the registered op. Other calls
    run the function itself, because the registered op costs more time on the host than a launch, and its gradient many
    times as much (docs/kernels.md).

    Args:
        mutates: names of the arguments that the function writes to.
    """

    def __init__(self, function: Callable[..., Any], mutates: tuple[str, ...] = ()) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.mutated = [place for place, name in enumerate(inspect.signature(function).parameters) if name in mutates]
        self.gradient: type[torch.autograd.Function] | None = None
        self.registered: Any = _register(function, mutates)
        self.overload = getattr(torch.ops.recurrent_depth_kernels, function.__name__).default

    def __call__(self, *args: Any, **named: Any) -> Any:
        if named or torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None or not _all_plain(args):
            return self.overload(*args, **named)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            return self.overload(*args) if self.gradient is None else self.gradient.apply(*args)
        for place in self.mutated:
            if not args[place].is_inference():
                torch.autograd.graph.increment_version(args[place])
        return self.function(*args)

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """Set the gradient, with the arguments of `torch.library.register_autograd`."""
        self.registered.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *args: Any) -> Any:
            output = self.function(*args)
            setup_context(ctx, args, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))}
        self.gradient = type(self.function.__name__, (torch.autograd.Function,), members)


def _all_plain(args: tuple[Any, ...]) -> bool:
    return all(type(x) in (Tensor, torch.nn.Parameter) for x in args if isinstance(x, Tensor))


def op(function: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Op:
    """Return the op of a function (decorator)."""
    return Op(function, mutates)


def _register(function: Callable[..., Any], mutates: tuple[str, ...]) -> Any:
    """Register a function with torch.

    On a GPU `triton_op` makes the kernels visible to torch.compile. Interpreted kernels cannot be traced: there the op
    is opaque, and its output shapes are inferred by running the function with launches skipped.
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
