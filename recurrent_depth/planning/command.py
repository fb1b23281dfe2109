"""`recurrent-depth plan`: memory and time of a run, computed from its options."""

from dataclasses import dataclass, field

from recurrent_depth.data.loader import PackedDataConfig, TaskDataConfig
from recurrent_depth.model.config import SHAPES
from recurrent_depth.model.recurrence import Checkpointing
from recurrent_depth.planning.devices import DEVICES, GB, LINK_EFFICIENCY, RESERVE, Device
from recurrent_depth.planning.finetuning import finetuning_table
from recurrent_depth.planning.pretraining import Job, communication, fits, memory, remedies, throughput
from recurrent_depth.training.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class PlanConfig(RunConfig):
    """Plan pretraining (`--config` of a run and `--num-gpus`), or print which fine-tuning fits which card (without).

    Args:
        num_gpus: GPUs of a pretraining run; null prints the table of fine-tuning.
        device: a100, h100, h200, mi300x or mi250x (one die).
        utilisation: share of the dense bfloat16 peak at which executed FLOPs (recomputation included) run.
        tokens: tokens of a row; null takes model.block_size.
        shape: of the fine-tuning table: tiny, small, huginn-3.5b.
        backprop_depth: of the table: steps of the core with gradient (k).
        checkpointing: of the table: recompute in the backward pass: none, step, block.
        lora_rank: of the table: LoRA on every linear layer.
    """

    out: str = ""
    data: TaskDataConfig | PackedDataConfig = field(default_factory=lambda: PackedDataConfig(path=""))
    num_gpus: int | None = None
    device: str = "h100"
    utilisation: float = 0.4
    tokens: int | None = None
    shape: str = "huginn-3.5b"
    backprop_depth: int = 8
    checkpointing: Checkpointing = "block"
    lora_rank: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shape not in SHAPES:
            raise ValueError(f"shape is {self.shape!r}; known shapes are {', '.join(SHAPES)}")
        if self.device not in DEVICES:
            raise ValueError(f"device is {self.device!r}; known devices are {', '.join(DEVICES)}")
        if self.backprop_depth < 1 or self.lora_rank < 1:
            raise ValueError("backprop_depth and lora_rank must be at least 1")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation is {self.utilisation}; it must lie in (0, 1]")
        if self.num_gpus is not None:
            self.rows_per_rank(self.num_gpus)
            shard = self.runtime.shard_size or self.num_gpus
            if self.num_gpus % shard:
                raise ValueError(f"runtime.shard_size {shard} does not divide num_gpus {self.num_gpus}")


def plan(config: PlanConfig) -> None:
    """Print the memory and time of a pretraining run, or the table of fine-tuning."""
    if config.num_gpus is None:
        print(finetuning_table(config.shape, config.backprop_depth, config.checkpointing, config.lora_rank))
        return
    job = Job(config, config.num_gpus, config.tokens or config.model.block_size)
    device = DEVICES[config.device]
    print(f"{config.num_gpus} x {config.device}; nothing here is measured on such a device\n")
    print(memory_table(job, device))
    print(time_table(job, device, config.utilisation))


def memory_table(job: Job, device: Device) -> str:
    """Return a table of the memory of one GPU by part, and whether it fits."""
    parts = memory(job)
    lines = ["| memory of one GPU | GB |", "|---|---|"]
    lines += [f"| {name} | {size / GB:.2f} |" for name, size in parts.items()]
    usable = device.memory * (1 - RESERVE)
    lines.append(f"| peak, of {usable / GB:.0f} usable | {sum(parts.values()) / GB:.2f} |")
    if fits(job, device):
        return "\n".join([*lines, "", "It fits.", ""])
    changes = remedies(job, device)
    advice = (
        f"It fits with {', '.join(changes)}." if changes else "No option under runtime is enough: raise micro_steps."
    )
    return "\n".join([*lines, "", f"It does not fit. {advice}", ""])


def time_table(job: Job, device: Device, utilisation: float) -> str:
    """Return a table of FLOPs, communication and time."""
    speed, sent = throughput(job, device, utilisation), communication(job)
    total = job.tokens_per_step * job.run.steps
    days = total / speed.tokens_per_second / 86_400
    rows = {
        "useful FLOPs per token, mean over the run": f"{speed.useful / 1e9:,.1f} GFLOP",
        "executed FLOPs per token, with recomputation": f"{speed.executed / 1e9:,.1f} GFLOP",
        "tokens per training step, and of the run": f"{job.tokens_per_step:,} and {total:,}",
        "gathered per training step (weights)": f"{sent['gather'] / GB:.2f} GB",
        "reduce-scattered per training step (gradients)": f"{sent['reduce_scatter'] / GB:.2f} GB",
        "all-reduced per training step (over replicas)": f"{sent['all_reduce'] / GB:.2f} GB",
        f"compute per training step, at {utilisation:.0%} of the peak": f"{speed.compute_seconds:.2f} s",
        f"communication per training step, {LINK_EFFICIENCY:.0%} of links": f"{speed.communication_seconds:.2f} s",
        "tokens/s": f"{speed.tokens_per_second:,.0f}",
        "days of the run": f"{days:,.1f}",
    }
    return "\n".join(["| time | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
