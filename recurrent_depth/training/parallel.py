"""Process groups, devices, and sharding with FSDP2."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor

from recurrent_depth.devices import choose_dtype, device_of_process
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.layers import rotary_table
from recurrent_depth.model.ops import choose_ops, use_ops
from recurrent_depth.model.transformer import RecurrentDepthModel, initial_value
from recurrent_depth.training.config import RuntimeConfig
from recurrent_depth.training.float8 import use_float8

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The rank and device of this process, and collectives that also work for a single process."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place, and return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """Return the values of all ranks, in the order of the ranks. Values are pickled, so they should be small."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=group)
        return values

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on the main rank only and return its result on all; an error is raised on every rank.

        Use it to read files and for actions that may fail: ranks that read a file at different times may see different
        content, and a rank that fails alone leaves the others waiting.
        """
        result: tuple[T | None, Exception | None] = (None, None)
        if self.is_main:
            try:
                result = (action(), None)
            except Exception as error:
                if self.world_size == 1:
                    raise
                result = (None, error)
        value, failure = self.gather(result)[0]
        if failure is not None:
            raise failure
        return value


def start_processes(config: RuntimeConfig) -> Ranks:
    """Join the process group of torchrun, if there is one, and choose the device of this process."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = device_of_process(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        _join(_backend(device), timedelta(minutes=config.timeout_minutes))
    return Ranks(rank, world, device)


def _join(backend: str, timeout: timedelta) -> None:
    """Join the process group.

    torchrun keeps its store over restarts, with the addresses of dead workers in it; on one node each attempt therefore
    uses its own keys. On several nodes the attempt numbers can differ between nodes (docs/scaling.md).
    """
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def build_model(config: ModelConfig, runtime: RuntimeConfig, ranks: Ranks, seed: int | None) -> RecurrentDepthModel:
    """Return the model, sharded unless there is one rank in float32.

    Args:
        seed: initial weights depend on (seed, name) only; None leaves them uninitialised, which takes no time.
    """
    dtype = choose_dtype(runtime.dtype, ranks.device)
    wrapped = ranks.world_size > 1 or dtype != torch.float32
    with torch.device("meta" if wrapped else "cpu"):
        model = RecurrentDepthModel(config)
    if runtime.float8:
        use_float8(model, ranks.device, dtype)
    if not wrapped:
        model.to(ranks.device)
        if seed is not None:
            model.initialise(seed)
    else:
        _shard(model, runtime, ranks, dtype)
        model.to_empty(device=ranks.device)
        _initialise_shards(model, config, seed)
    use_ops(model, choose_ops(runtime.kernels, ranks.device))
    model.transformer.core_block.activation_checkpointing = runtime.activation_checkpointing
    if runtime.compile:
        for block in blocks(model):
            block.compile()
    return model


def blocks(model: RecurrentDepthModel) -> list[nn.Module]:
    parts = model.transformer
    return [*parts.prelude, *parts.core_block, *parts.coda]


def _shard(model: RecurrentDepthModel, runtime: RuntimeConfig, ranks: Ranks, dtype: torch.dtype) -> None:
    """Shard the model in FSDP units: each prelude and coda block, the whole core, and the rest in the root.

    The core is one unit, so that its weights are gathered once for all iterations. The adapter is in the root, because
    the core uses slices of its weight and never calls it.
    """
    shard = runtime.shard_size or ranks.world_size
    if ranks.world_size % shard:
        raise ValueError(f"runtime.shard_size {shard} does not divide the {ranks.world_size} ranks; choose a divisor")
    if not dist.is_initialized():  # one rank in bfloat16: FSDP keeps its fp32 master weights
        dist.init_process_group(_backend(ranks.device), store=dist.HashStore(), rank=0, world_size=1)
    if shard == ranks.world_size:
        mesh = init_device_mesh(ranks.device.type, (shard,), mesh_dim_names=("shard",))
    else:
        shape = (ranks.world_size // shard, shard)
        mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard"))
    # Inputs keep their dtype: the rotary table stays fp32.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    parts = model.transformer
    for unit in [*parts.prelude, parts.core_block, *parts.coda]:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=runtime.reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


@torch.no_grad()
def _initialise_shards(model: RecurrentDepthModel, config: ModelConfig, seed: int | None) -> None:
    if config.tie_embeddings:  # to_empty has allocated two tensors
        model.lm_head.weight = model.transformer.wte.weight
    model.freqs_cis.copy_(rotary_table(config))
    if seed is None:
        return
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor)
        whole = initial_value(name, p.shape, config, seed).to(p.device)
        p.copy_(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None))


def reshard(model: nn.Module) -> None:
    """Free gathered weights, so that the parameters are the sharded ones again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def set_last_micro_step(model: nn.Module, last: bool) -> None:
    """Reduce gradients (and free gathered weights) only in the last micro-step of a training step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
        model.set_is_last_backward(last)
