"""Count calls and bytes of the collectives of FSDP2."""

import importlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch.distributed as dist
from torch import Tensor

GROUP = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_param_group")
NAMES = {  # names in torch 2.13 and in torch 2.11
    "all_gather_single": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce": "all_reduce",
}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count `gathers` and `reduces` of FSDP units, and calls, bytes and dtypes of each kind of collective.

    Bytes are those of the whole tensor: the output of an all-gather, the input of a reduce-scatter or all-reduce.
    """
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        for name, key in (("foreach_all_gather", "gathers"), ("foreach_reduce", "reduces")):
            stack.enter_context(mock.patch.object(GROUP, name, _counting(getattr(GROUP, name), counts, key)))
        for name, kind in NAMES.items():
            if hasattr(dist, name):
                original = getattr(dist, name)
                stack.enter_context(mock.patch.object(dist, name, _measuring(original, counts, kind)))
        yield counts


def _counting(original, counts, key):
    def call(*args, **kwargs):
        counts[key] += 1
        return original(*args, **kwargs)

    return call


def _measuring(original, counts, kind):
    def call(*args, **kwargs):
        tensor = max((a for a in [*args, *kwargs.values()] if isinstance(a, Tensor)), key=Tensor.numel)
        counts[kind] += 1
        counts[f"{kind}_bytes"] += tensor.numel() * tensor.element_size()
        counts[f"{kind}_{str(tensor.dtype).removeprefix('torch.')}"] += 1
        return original(*args, **kwargs)

    return call
