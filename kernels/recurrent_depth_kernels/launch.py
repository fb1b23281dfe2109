"""One launch of one kernel, described before it happens.

An op builds a `Launch` and runs it. The same description tells the compiler check what would really be compiled (run
the op on meta tensors inside `planned(target)`), a test how many kernels a step takes (`watched()`), and torch what
the op's outputs look like (its body on fake tensors, with launches left out).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from recurrent_depth_kernels import targets

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Kernels run in Triton's interpreter on CPU tensors: TRITON_INTERPRET=1 was set when this package was imported."""

_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip

_skipped: ContextVar[bool] = ContextVar("skipped", default=False)
_seen: ContextVar["list[Launch] | None"] = ContextVar("seen", default=None)


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid, its run-time arguments and what it is compiled for.

    Attributes:
        kernel: a `triton.jit` function.
        grid: programs along each axis.
        arguments: run-time arguments by name, tensors and numbers.
        constants: `tl.constexpr` arguments by name.
        num_warps, num_stages: compiler options.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        """Launch the kernel, unless inside `skipped()` or `planned()`; a grid without programs does nothing."""
        seen = _seen.get()
        if seen is not None:
            seen.append(self)
        if _skipped.get() or 0 in self.grid:
            return
        self._check_devices()
        kernel = self.kernel if INTERPRETED else torch.library.wrap_triton(self.kernel)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        kernel[self.grid](**self.arguments, **self.constants, **options)

    def _check_devices(self) -> None:
        wanted = "cpu" if INTERPRETED else "cuda"
        real = [value for value in self.arguments.values() if type(value) in (Tensor, torch.nn.Parameter)]
        found = {value.device.type for value in real}
        if found - {wanted}:
            raise ValueError(
                f"the kernel {self.name} got tensors on {', '.join(sorted(found))}; it runs on {wanted} tensors"
                f"{' in the interpreter' if INTERPRETED else ''}: move the model, or use kernels: torch"
            )

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def label(self) -> str:
        """The name and the constants that are set: tells variants of one kernel apart."""
        values = (f"{k}={v}" for k, v in self.constants.items() if v is not False)
        return f"{self.name}({', '.join(values)})"

    def signature(self) -> dict[str, str]:
        """Argument types as `triton.compiler.ASTSource` wants them, in the order of the kernel's arguments."""
        return {name: self._type(name) for name in self.kernel.arg_names}

    def constexprs(self) -> dict[str, Any]:
        """Values of the arguments whose type is constexpr: Triton makes one of an integer that is 1 as well."""
        ones = {name: 1 for name, value in self.arguments.items() if _is_one(value)}
        return self.constants | ones

    def attributes(self, backend: str) -> dict[tuple[int], list[list[Any]]]:
        """What Triton knows of aligned tensors and of integers divisible by 16; `backend` is cuda or hip."""
        found = {}
        for place, name in enumerate(self.kernel.arg_names):
            value = self.arguments.get(name)
            if isinstance(value, Tensor):
                attributes = [["tt.divisibility", 16]]
                if backend == "hip" and value.numel() * value.element_size() < 2**31:
                    attributes.append(["tt.pointer_range", 32])
                found[(place,)] = attributes
            elif isinstance(value, int) and value % 16 == 0:
                found[(place,)] = [["tt.divisibility", 16]]
        return found

    def _type(self, name: str) -> str:
        if name in self.constants:
            return "constexpr"
        value = self.arguments[name]
        if isinstance(value, Tensor):
            return "*" + _TYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        return "constexpr" if _is_one(value) else "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and value == 1


@contextmanager
def skipped() -> Iterator[None]:
    """Launches inside do nothing: for shapes alone."""
    token = _skipped.set(True)
    try:
        yield
    finally:
        _skipped.reset(token)


@contextmanager
def watched() -> Iterator[list[Launch]]:
    """The launches of the code inside, in order, as they run."""
    launches: list[Launch] = []
    token = _seen.set(launches)
    try:
        yield launches
    finally:
        _seen.reset(token)


@contextmanager
def planned(arch: str) -> Iterator[list[Launch]]:
    """The launches that the code inside would make on a GPU of `arch` (sm_90, gfx942, ...); nothing runs."""
    with targets.assumed(arch), skipped(), watched() as launches:
        yield launches
