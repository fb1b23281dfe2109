"""Memory, communication and time of a pretraining run, from its configuration.

Memory is that of FSDP2 with the core as one unit (training/parallel.py): what is kept throughout a training step, plus
the largest of its temporary parts. Communication is counted in whole tensors; tests/training/test_collectives.py
compares it with real ranks.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.flops import sampled_depths
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.planning.activations import activation_bytes, head_bytes, recomputed_bytes
from recurrent_depth.planning.devices import LINK_EFFICIENCY, RESERVE, Device
from recurrent_depth.training.config import RunConfig
from recurrent_depth.training.objective import gradient_steps, kept_logit_bytes, micro_step_flops, states_read
from recurrent_depth.training.optimizer import ramped

_MASTER = 4  # bytes of a weight, a gradient or a moment in fp32


@dataclass(frozen=True)
class Job:
    """A run, the GPUs it runs on, and the tokens of its rows."""

    run: RunConfig
    gpus: int
    tokens: int

    @property
    def shards(self) -> int:
        """Ranks that share one copy of the weights."""
        return self.run.runtime.shard_size or self.gpus

    @property
    def replicas(self) -> int:
        """Copies of the weights."""
        return self.gpus // self.shards

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of activations and gathered weights."""
        return torch.float32 if self.run.runtime.dtype == "float32" else torch.bfloat16

    @property
    def is_wrapped(self) -> bool:
        """Whether FSDP wraps the model; a single process in fp32 trains without it."""
        return self.gpus > 1 or self.compute_dtype != torch.float32

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a training step, over all GPUs."""
        return self.run.batch_size * self.tokens


@dataclass(frozen=True)
class Sizes:
    """Parameters of the FSDP units, and the values that the optimizer keeps.

    Attributes:
        total: parameters of the whole model.
        core: parameters of the core.
        outer: parameters of all blocks of prelude and coda.
        block: parameters of one such block.
        moments: values of the optimizer's moments.
    """

    total: int
    core: int
    outer: int
    block: int
    moments: int

    @property
    def root(self) -> int:
        """Parameters of embedding, adapter and final norm, gathered throughout a training step."""
        return self.total - self.core - self.outer


def parameters(config: ModelConfig) -> int:
    """Return the parameters of a model, counted on the meta device."""
    return _sizes(config, muon=False).total


def sizes(job: Job) -> Sizes:
    """Return the sizes of a job's model, counted on the meta device."""
    return _sizes(job.run.model, job.run.optimizer.name == "muon")


@lru_cache
def _sizes(config: ModelConfig, muon: bool) -> Sizes:
    with torch.device("meta"):
        model = RecurrentDepthModel(config)
    named = dict(model.named_parameters())
    total, core = model.num_parameters, _count(model.transformer.core_block)
    outer = [_count(block) for block in [*model.transformer.prelude, *model.transformer.coda]]
    by_muon = [p for name, p in named.items() if p.ndim == 2 and "wte" not in name and "lm_head" not in name]
    moments = 2 * total - (sum(p.numel() for p in by_muon) if muon else 0)
    return Sizes(total, core, sum(outer), outer[0], moments)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def memory(job: Job) -> dict[str, int]:
    """Return the peak memory of one GPU in a training step, in bytes by part."""
    size, width = sizes(job), job.compute_dtype.itemsize
    if job.run.trainable == "gate":
        return _memory_of_gate_training(job, size)
    always = {
        "weights (fp32)": _MASTER * size.total // job.shards,
        "optimizer": _MASTER * size.moments // job.shards,
        "gathered weights": width * _gathered(job, size),
        "accumulated gradients, whole": _MASTER * size.total if job.run.micro_steps > 1 else 0,
    }
    activations, recomputed, logits = _activations(job)
    core_gradients = width * size.core
    moments = [
        {"activations": activations, "logits and their gradients": logits},
        {"activations": activations, "recomputed": recomputed, "gradients of the core": core_gradients},
        {
            "gradients of the core": core_gradients,
            "reduction of the core's gradients": _MASTER * size.core if job.is_wrapped else 0,
            "gradients (fp32)": _MASTER * size.total // job.shards,
        },
    ]
    return always | max(moments, key=lambda moment: sum(moment.values()))


def _memory_of_gate_training(job: Job, size: Sizes) -> dict[str, int]:
    """Return the parts of a run that trains the gate alone: no large gradients, and only the states are kept."""
    run, model, width = job.run, job.run.model, job.compute_dtype.itemsize
    rows = run.rows_per_rank(job.gpus)
    tokens, at_once = rows * job.tokens, _tokens_at_once(job, rows)
    deepest = _deepest(job)
    inputs = 0 if model.gate is None else model.n_embd * (2 if model.gate.input == "state_and_change" else 1)
    moments = [
        {"inputs of the gate": (deepest + 1) * tokens * inputs * _MASTER},
        {"a block": tokens * (4 * model.n_embd + 3 * model.intermediate_size) * width},
        {"logits": at_once * model.vocab_size * (width + 2 * _MASTER)},  # also in fp32, and their log-probabilities
    ]
    return {
        "weights (fp32)": _MASTER * size.total // job.shards,
        "gathered weights": width * _gathered(job, size),
        "states": (deepest + 4) * tokens * model.n_embd * width,  # of the core, the prelude, and differences
    } | max(moments, key=lambda moment: sum(moment.values()))


def _tokens_at_once(job: Job, rows: int) -> int:
    """Return the tokens whose logits are computed at a time."""
    return min(rows * job.tokens, job.run.runtime.loss_chunk_size or rows * job.tokens)


def _activations(job: Job) -> tuple[int, int, int]:
    """Return the bytes kept for the backward pass, of a recomputed part, and of the head."""
    run, runtime, config, dtype = job.run, job.run.runtime, job.run.model, job.compute_dtype
    rows, recompute = run.rows_per_rank(job.gpus), runtime.activation_checkpointing
    kernels = runtime.kernels
    one, two = (activation_bytes(config, rows, job.tokens, (0, k), recompute, dtype, kernels) for k in (1, 2))
    kept = one + (_deepest(job) - 1) * (two - one)  # every iteration keeps the same number of bytes
    further = states_read(run, _deepest(job)) - 1
    if further:
        read_twice = activation_bytes(config, rows, job.tokens, (0, 1), recompute, dtype, kernels, reads=2)
        gradient_of_state = rows * job.tokens * config.n_embd * dtype.itemsize  # all reads go back before the core
        kept += further * (read_twice - one + gradient_of_state)
    again = recomputed_bytes(config, rows, job.tokens, recompute, dtype, kernels)
    logits = head_bytes(config, 1, _tokens_at_once(job, rows))
    if runtime.loss_chunk_size is None:
        logits += further * kept_logit_bytes(run.objective) * rows * job.tokens * config.vocab_size
    return kept, again, logits


def _gathered(job: Job, size: Sizes) -> int:
    if not job.is_wrapped:
        return 0
    if job.run.runtime.reshard_after_forward:
        return size.root + size.core + size.block
    return size.total


def _deepest(job: Job) -> int:
    """Return the largest number of iterations with gradient (full backpropagation: of the first 4096 depths).

    If the gate alone is trained: of all iterations.
    """
    run, model = job.run, job.run.model
    if model.mean_backprop_depth is not None and model.sampling_scheme != "fixed" and run.trainable != "gate":
        return model.mean_backprop_depth
    depths = sampled_depths(model, min(run.steps, 4096), run.seed)
    return max(gradient_steps(run, depth)[1] for depth in depths)


def communication(job: Job) -> dict[str, int]:
    """Return the bytes of the collectives of one training step, by kind, counted in whole tensors.

    They do not depend on the depth, but the coda communicates for every state that the objective reads.
    """
    if not job.is_wrapped or job.gpus == 1:
        return {"gather": 0, "reduce_scatter": 0, "all_reduce": 0}
    run, size, width = job.run, sizes(job), job.compute_dtype.itemsize
    further = (states_read(run, _deepest(job)) - 1) * run.model.n_layers_in_coda * size.block
    freed, frozen = run.runtime.reshard_after_forward, run.trainable == "gate"
    # The backward pass of a read frees the coda in the last micro-step, so that the next read gathers it again.
    gathered = size.total + (0 if frozen else further)
    if freed:
        gathered += (run.micro_steps - frozen) * (size.total - size.root) + run.micro_steps * further
    reduced = 0 if frozen else size.total + further  # the gate alone is less than a thousandth
    sharded, replicated = job.shards > 1, job.replicas > 1
    return {
        "gather": width * gathered if sharded else 0,
        "reduce_scatter": _MASTER * reduced if sharded else 0,
        "all_reduce": _MASTER * reduced // job.shards if replicated else 0,
    }


def communication_seconds(job: Job, device: Device) -> float:
    """Return the communication time of a training step in seconds: rings at LINK_EFFICIENCY, without overlap."""
    whole, shards, replicas = communication(job), job.shards, job.replicas
    one_node = shards <= device.per_node
    # A ring over several nodes leaves each node once, over all network ports of the node.
    inside = device.link if one_node else min(device.link, device.network * device.per_node)
    across = device.link if job.gpus <= device.per_node else device.network
    seconds = (whole["gather"] + whole["reduce_scatter"]) * (shards - 1) / shards / inside
    seconds += 2 * whole["all_reduce"] * (replicas - 1) / replicas / across
    return seconds / LINK_EFFICIENCY


@dataclass(frozen=True)
class Throughput:
    """Expected speed of a run.

    Attributes:
        useful: FLOPs per token without recomputation, as MFU counts them.
        executed: FLOPs per token with recomputation, as HFU counts them.
        compute_seconds: compute time of a training step.
        communication_seconds: communication time of a training step, without overlap.
        tokens_per_second: tokens/s over all GPUs.
    """

    useful: float
    executed: float
    compute_seconds: float
    communication_seconds: float
    tokens_per_second: float


def throughput(job: Job, device: Device, utilisation: float) -> Throughput:
    """Return the expected speed, with executed FLOPs at `utilisation` of the peak and communication not overlapped."""
    useful = _mean_flops(job, executed=False) / job.tokens
    executed = _mean_flops(job, executed=True) / job.tokens
    compute = executed * job.tokens_per_step / job.gpus / (device.peak * utilisation)
    sending = communication_seconds(job, device)
    return Throughput(useful, executed, compute, sending, job.tokens_per_step / (compute + sending))


def _mean_flops(job: Job, executed: bool) -> float:
    """Return the mean FLOPs of a row over the run, its depth ramp included."""

    def mean(model: ModelConfig, draws: int) -> float:
        counts = Counter(sampled_depths(model, draws))
        return sum(
            n * micro_step_flops(run, job.tokens, depth, executed=executed) for depth, n in counts.items()
        ) / draws  # fmt: skip

    run = job.run
    flops = mean(ramped(run.model, run.depth_ramp, run.steps), 4096)
    if run.depth_ramp is None:
        return flops
    last = min(run.depth_ramp.steps, run.steps)
    moments = [(2 * i + 1) * last // 32 for i in range(16)]
    growing = [mean(ramped(run.model, run.depth_ramp, m), 512) for m in moments]
    return (last * sum(growing) / len(growing) + (run.steps - last) * flops) / run.steps


def fits(job: Job, device: Device) -> bool:
    """Return whether the peak memory fits the device with RESERVE left free."""
    return sum(memory(job).values()) <= device.memory * (1 - RESERVE)


def remedies(job: Job, device: Device) -> list[str]:
    """Return the options to change, in order, to make the run fit; none if it already fits or never fits."""
    taken: list[str] = []
    if fits(job, device):
        return taken
    least = sum(memory(job).values())
    for field, value in (
        ("loss_chunk_size", 2048), ("activation_checkpointing", "step"), ("activation_checkpointing", "block"),
        ("shard_size", None), ("reshard_after_forward", True),
    ):  # fmt: skip
        changed = _with(job, field, value)
        needed = sum(memory(changed).values())
        if needed < least:
            job, least = changed, needed
            taken.append(f"--runtime.{field} {'null' if value is None else str(value).lower()}")
        if fits(job, device):
            return taken
    rows = job.run.batch_size // job.run.micro_steps
    while job.gpus < rows and rows % (2 * job.gpus) == 0:
        job = dataclasses.replace(job, gpus=2 * job.gpus)
        if fits(job, device):
            return [*taken, f"--num-gpus {job.gpus}"]
    return []


def _with(job: Job, field: str, value: object) -> Job:
    runtime = dataclasses.replace(job.run.runtime, **{field: value})  # type: ignore[arg-type]
    return dataclasses.replace(job, run=dataclasses.replace(job.run, runtime=runtime))
