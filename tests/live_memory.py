"""Measure the bytes of live CPU tensors and their peak, as the allocator of a GPU would report them."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Sum the storages of all live tensors that operations have returned. `peak` is in bytes."""

    def __init__(self, *existing: torch.Tensor) -> None:
        super().__init__()
        self.storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.peak = 0
        for tensor in existing:
            self.storages.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and type(leaf) is torch.Tensor and leaf.device.type == "cpu":
                self.storages.add(leaf.untyped_storage())
        self.peak = max(self.peak, self.current())
        return result

    def current(self) -> int:
        """Return the live bytes; a resized storage counts with its current size."""
        return sum({storage._cdata: storage.nbytes() for storage in list(self.storages)}.values())
