"""A GPU that exists only in its device checks, so that tensors on the wrong device are found without a GPU.

torch's FakeTensorMode cannot be used: with device cuda it needs a torch that was built for CUDA, and fake tensors have
no values, on which decoding depends.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
_READS = {
    "item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero", "equal",
    "masked_select",
}  # fmt: skip
_SAME_DEVICE_SCALARS = {"cat", "stack", "concat"}
_MIXED = {"copy_", "__get__", "__set__", "_has_compatible_shallow_copy_type"}  # copies, properties, Module.to


class PretendedGPU(TorchFunctionMode):
    """Inside this context tensors on cuda are computed on the CPU, with their values, and say that they are on cuda.

    A call that mixes tensors of both devices raises as on a GPU. It also raises where torch would copy an index or an
    assigned tensor to the GPU by itself, because the host then waits for the GPU. Scalars on the CPU are allowed.

    Attributes:
        reads: how often the host has read values of tensors on cuda, by the name of the function.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return device_of(args[0])
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return device_of(args[0]) == CUDA
        if func == Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
            return device_of(args[0]) == CPU
        name = getattr(func, "__name__", "")
        tensors = [*_tensors(args), *_tensors(kwargs)]
        on_gpu = any(device_of(tensor) == CUDA for tensor in tensors)
        if on_gpu and name in _READS:
            self.reads[name] += 1
        if name in ("to", "cuda", "cpu", "pin_memory"):
            return _moved(func, name, args, kwargs)
        if on_gpu and name not in _MIXED:
            _check_devices(name, tensors)
        wanted = _as_device(kwargs.get("device"))
        if wanted == CUDA:
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        result = func(*args, **kwargs)
        if wanted == CUDA or (wanted is None and on_gpu):
            _mark(_tensors(result))
        return result


def device_of(tensor: Tensor) -> torch.device:
    """Return the device that a tensor says it is on."""
    with torch._C.DisableTorchFunction():
        real = tensor.device
        return CUDA if real == CPU and getattr(_storage(tensor), "pretended", False) else real


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value, which may be a nested tuple, list or dictionary."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _mark(tensors: Iterable[Tensor]) -> None:
    """Mark the memory of tensors as memory of the GPU; views share it."""
    with torch._C.DisableTorchFunction():
        for tensor in tensors:
            _storage(tensor).pretended = True


def _storage(tensor: Tensor) -> Any:
    """Return the memory of a tensor, also inside vmap."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.untyped_storage()


def _as_device(value: Any) -> torch.device | None:
    """Return the device meant by an argument; None if the argument is not a device."""
    if not isinstance(value, str | torch.device):
        return None
    device = torch.device(value)
    return CUDA if device.type == "cuda" else device


def _moved(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the result of `to`, `cuda` or `cpu`: other memory if the device changes."""
    source = device_of(args[0])
    target = {"cuda": CUDA, "cpu": CPU}.get(name, source)
    changed = []
    for value in (*args[1:], kwargs.pop("device", None), kwargs.pop("other", None)):
        if isinstance(value, Tensor):
            target = device_of(value)
            changed.append(value.dtype)
        elif _as_device(value) is not None:
            target = _as_device(value) or target
        elif isinstance(value, torch.dtype):
            changed.append(value)
    if target.type == "meta":
        return func(*args, **kwargs)
    kwargs.pop("non_blocking", None)
    result = args[0].to(CPU, *changed, **kwargs)
    if target != source and result.data_ptr() == args[0].data_ptr():
        result = result.clone()
    if target == CUDA:
        _mark([result])
    return result


def _check_devices(name: str, tensors: list[Tensor]) -> None:
    """Raise if tensors on the CPU are among the arguments of a function on the GPU, except scalars."""
    for tensor in tensors:
        if device_of(tensor) == CPU and (tensor.ndim or name in _SAME_DEVICE_SCALARS):
            raise RuntimeError(
                f"{name}: expected all tensors on the same device, but found one of shape {list(tensor.shape)} on the "
                "CPU beside others on cuda:0"
            )
