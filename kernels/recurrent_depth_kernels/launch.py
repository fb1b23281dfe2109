"""The description of a kernel launch.

An op builds a `Launch` and runs it. The same description is used by the compilation check (the op on meta tensors
inside `planned(arch)`), by tests that count launches (`watched()`), and by torch to infer the shapes of outputs (the op
on fake tensors inside `skipped()`).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from recurrent_depth_kernels import targets

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter on CPU tensors: TRITON_INTERPRET=1 was set at import."""

_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip

_skipped: ContextVar[bool] = ContextVar("skipped", default=False)
_watchers: list["list[Launch]"] = []  # of the whole process: on a GPU the backward pass runs in another thread


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid, arguments and compiler options.

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
        """Launch the kernel, unless inside `skipped()` or `planned()`. An empty grid does nothing."""
        for seen in _watchers:
            seen.append(self)
        if _skipped.get() or 0 in self.grid:
            return
        devices = {x.device for x in self.arguments.values() if type(x) in (Tensor, torch.nn.Parameter)}
        self._check_devices(devices)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if INTERPRETED:
            self.kernel[self.grid](**self.arguments, **self.constants, **options)
            return
        kernel = torch.library.wrap_triton(self.kernel) if torch.compiler.is_compiling() or not devices else self.kernel
        # Triton launches on the current GPU, whatever GPU the tensors are on.
        gpu = next(iter(devices), None)
        with torch.cuda.device(gpu) if gpu is not None and gpu.index != torch.cuda.current_device() else nullcontext():
            kernel[self.grid](**self.arguments, **self.constants, **options)

    def _check_devices(self, devices: set[torch.device]) -> None:
        wanted = "cpu" if INTERPRETED else "cuda"
        found = {device.type for device in devices}
        if found - {wanted}:
            raise ValueError(
                f"the kernel {self.name} got tensors on {', '.join(sorted(found))}; it needs {wanted} tensors"
                f"{' in the interpreter' if INTERPRETED else ''}: move the model, or use kernels: torch"
            )

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def label(self) -> str:
        """The name with the constants that are set, which distinguishes the variants of a kernel."""
        values = (f"{k}={v}" for k, v in self.constants.items() if v is not False)
        return f"{self.name}({', '.join(values)})"

    def signature(self) -> dict[str, str]:
        """Return the argument types for `triton.compiler.ASTSource`, in the order of the kernel's arguments."""
        return {name: self._type(name) for name in self.kernel.arg_names}

    def constexprs(self) -> dict[str, Any]:
        """Return the values of constexpr arguments, which for Triton include integers that are 1."""
        ones = {name: 1 for name, value in self.arguments.items() if _is_one(value)}
        return self.constants | ones

    def attributes(self, backend: str) -> dict[tuple[int], list[list[Any]]]:
        """Return Triton's attributes of aligned tensors and integers divisible by 16; `backend` is cuda or hip."""
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
    """Skip the launches inside, to infer shapes."""
    token = _skipped.set(True)
    try:
        yield
    finally:
        _skipped.reset(token)


@contextmanager
def watched() -> Iterator[list[Launch]]:
    """Yield a list that collects the launches inside, in order, while they run."""
    launches: list[Launch] = []
    _watchers.append(launches)
    try:
        yield launches
    finally:
        _watchers[:] = [other for other in _watchers if other is not launches]


@contextmanager
def planned(arch: str) -> Iterator[list[Launch]]:
    """Yield a list that collects the launches inside as for a GPU of `arch` (sm_90, gfx942, ...); nothing runs."""
    with targets.assumed(arch), skipped(), watched() as launches:
        yield launches
