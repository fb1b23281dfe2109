"""Options of training: what `recurrent-depth train` and `recurrent-depth average` read. Imports no torch."""

import dataclasses
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import yaml

from recurrent_depth.data.config import PackedDataConfig, TaskDataConfig, ThinkingDataConfig
from recurrent_depth.model.config import Checkpointing, Kernels, ModelConfig


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights move.

    Args:
        name: `huginn` (arXiv 2502.05171, section 4.3: atan2 form, no epsilon, update clipping), `adamw` and `nadamw`
            (torch's, decoupled weight decay), or `muon` (matrices of the blocks by Muon, the rest by AdamW).
        lr: peak learning rate.
        weight_decay: decay of matrices; none on norms and biases. For `huginn` it is not multiplied by lr, but by
            lr / peak lr.
        eps: of the Adam variants; `huginn` has none.
        momentum: of `muon`.
        gradient_clip: largest global gradient norm.
        schedule: after the warm-up: `trapezoid` (hold, then decay over cooldown_steps), `constant`, or `linear` and
            `cosine` decay to the end of the run.
        warmup_steps: linear warm-up.
        cooldown_steps: of `trapezoid`: linear decay over the last steps of the run; 0 for none.
        final_lr: where a decay ends, as a share of lr.
    """

    name: Literal["huginn", "adamw", "nadamw", "muon"] = "huginn"
    lr: float = 4e-5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 4e-5
    eps: float = 1e-8
    momentum: float = 0.95
    gradient_clip: float = 1.0
    schedule: Literal["trapezoid", "constant", "linear", "cosine"] = "trapezoid"
    warmup_steps: int = 4096
    cooldown_steps: int = 0
    final_lr: float = 0.0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optimizer.lr is {self.lr}; it must be positive")
        if self.gradient_clip <= 0:
            raise ValueError("optimizer.gradient_clip must be positive; use .inf for no clipping")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas is {self.betas}; each must lie in [0, 1)")
        if self.weight_decay < 0 or self.warmup_steps < 0 or self.cooldown_steps < 0:
            raise ValueError(
                "optimizer.weight_decay, optimizer.warmup_steps and optimizer.cooldown_steps must not be negative"
            )
        if self.eps <= 0 or not 0 <= self.momentum < 1 or not 0 <= self.final_lr <= 1:
            raise ValueError(
                "optimizer.eps must be positive, optimizer.momentum in [0, 1) and optimizer.final_lr in [0, 1]"
            )
        if self.cooldown_steps and self.schedule != "trapezoid":
            raise ValueError(
                f"optimizer.cooldown_steps belongs to the schedule trapezoid; set it to 0 for {self.schedule}"
            )


@dataclass(frozen=True)
class DepthRampConfig:
    """A curriculum on depth: the mean recurrence grows linearly from `start` to model.mean_recurrence.

    Args:
        start: mean recurrence of the first step.
        steps: optimizer steps until the full mean. Sampling never takes a mean below model.mean_backprop_depth.
    """

    start: int = 1
    steps: int = 1000

    def __post_init__(self) -> None:
        if self.start < 1 or self.steps < 1:
            raise ValueError("depth_ramp.start and depth_ramp.steps must be at least 1")


@dataclass(frozen=True)
class RuntimeConfig:
    """How a run uses its machine; never part of the architecture.

    Args:
        device: `auto` takes a GPU (CUDA or ROCm) if there is one.
        dtype: of the forward and backward pass; `auto` is bfloat16 on a GPU and float32 on a CPU. Weights, optimizer
            and gradient reductions stay float32.
        shard_size: ranks that share one copy of the weights; null: all ranks (FSDP). 1 is plain replication, a
            number between is hybrid sharding.
        reshard_after_forward: free gathered weights after the forward pass (ZeRO-3) instead of keeping them (ZeRO-2).
        activation_checkpointing: recompute single `block`s or whole `step`s of the core in the backward pass.
        compile: torch.compile each block (never the loop).
        kernels: who computes the element-wise operations; `auto` is `triton` on a GPU and `torch` on a CPU.
        loss_chunk_size: tokens whose logits exist at one time; null: all.
        threads: CPU threads of each process; null leaves torch's choice.
        timeout_minutes: how long a rank waits in a collective for the others before the run is ended.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    shard_size: int | None = None
    reshard_after_forward: bool = False
    activation_checkpointing: Checkpointing = "none"
    compile: bool = False
    kernels: Kernels = "auto"
    loss_chunk_size: int | None = None
    threads: int | None = None
    timeout_minutes: float = 10.0

    def __post_init__(self) -> None:
        for name in ("shard_size", "loss_chunk_size", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"runtime.{name} is {value}; it must be at least 1, or null")
        if self.timeout_minutes <= 0:
            raise ValueError("runtime.timeout_minutes must be positive")


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep.

    Args:
        every: steps between checkpoints; the last step is always saved.
        keep_last: newest checkpoints kept.
        keep_every: checkpoints whose step is a multiple of this are kept for good; null keeps none.
        background: go on training while files are written; needs the state a second time in CPU memory.
    """

    every: int = 1000
    keep_last: int = 2
    keep_every: int | None = None
    background: bool = True

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep_last < 1 or (self.keep_every is not None and self.keep_every < 1):
            raise ValueError("checkpoint.every, checkpoint.keep_last and checkpoint.keep_every must be at least 1")


@dataclass(frozen=True)
class ValidationConfig:
    """Args:
    every: steps between validations; the last step always has one.
    rows: held-out rows, over all ranks.
    num_steps: depths at which the loss is measured; one step and the mean depth are always among them.
    """

    every: int = 500
    rows: int = 256
    num_steps: tuple[int, ...] = (1, 4, 8, 16, 32, 64)

    def __post_init__(self) -> None:
        if self.every < 1 or self.rows < 1 or any(r < 1 for r in self.num_steps):
            raise ValueError(
                "validation.every, validation.rows and every entry of validation.num_steps must be at least 1"
            )


@dataclass(frozen=True)
class HealthConfig:
    """Limits of the health checks, which run with every validation.

    Args:
        collapse_correlation: token correlation above which the run is aborted.
        collapse_checks: checks in a row above that limit before the abort.
        ignored_state_gap: share of the loss; a smaller gain of the mean depth over one step means an ignored state.
        ignored_state_checks: checks in a row (after warm-up) below that share before the warning.
        skipped_steps: steps in a row with a non-finite loss or gradient before the abort.
    """

    collapse_correlation: float = 0.99
    collapse_checks: int = 3
    ignored_state_gap: float = 0.01
    ignored_state_checks: int = 5
    skipped_steps: int = 10


@dataclass(frozen=True)
class SpikeConfig:
    """When a loss counts as a spike.

    Args:
        factor: a loss above this multiple of the median of the last losses is a spike; null turns the guard off.
        window: how many losses the median is taken of; the guard waits until it has that many.
        margin: steps that must lie between the checkpoint and the spike, since a spike often begins before it shows.
        max_rewinds: of one run; another spike aborts it.
    """

    factor: float | None = None
    window: int = 128
    margin: int = 0
    max_rewinds: int = 5

    def __post_init__(self) -> None:
        if self.factor is not None and self.factor <= 1:
            raise ValueError("spikes.factor must be above 1, or null for no guard")
        if self.window < 1 or self.margin < 0 or self.max_rewinds < 0:
            raise ValueError("spikes.window must be at least 1, spikes.margin and spikes.max_rewinds at least 0")


@dataclass(frozen=True)
class RunConfig:
    """One training run.

    Args:
        out: run folder.
        data: packed rows on disk, a generated task, or generated puzzles with traces.
        steps: optimizer steps of the whole run.
        batch_size: rows of one optimizer step, over all ranks.
        micro_steps: parts into which a step is split (gradient accumulation); each draws its own depth. Rows of a
            micro-step are shared among the ranks, so the number of ranks changes neither data nor depths.
        seed: of weights, data order, depths and initial states.
        log_every: steps between lines of metrics.jsonl.
        max_hours: save and stop after this time; null for no limit.
        slurm_margin_minutes: under Slurm, save and stop so long before the job's end (SLURM_JOB_END_TIME).
        depth_ramp: a curriculum on depth; null samples around model.mean_recurrence from the first step.
        init_from: a run, checkpoint, export or Huginn folder whose weights to start from; null starts from scratch.
    """

    out: str
    data: TaskDataConfig | ThinkingDataConfig | PackedDataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    steps: int = 1000
    batch_size: int = 32
    micro_steps: int = 1
    seed: int = 0
    log_every: int = 10
    max_hours: float | None = None
    slurm_margin_minutes: float = 5.0
    depth_ramp: DepthRampConfig | None = None
    init_from: str | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    spikes: SpikeConfig = field(default_factory=SpikeConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_steps", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.batch_size % self.micro_steps:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_steps {self.micro_steps}")
        if self.max_hours is not None and self.max_hours <= 0:
            raise ValueError("max_hours must be positive, or null")
        if self.depth_ramp is not None and self.depth_ramp.start > self.model.mean_recurrence:
            raise ValueError(
                f"depth_ramp.start {self.depth_ramp.start} is above model.mean_recurrence {self.model.mean_recurrence}"
            )
        if self.slurm_margin_minutes < 0:
            raise ValueError("slurm_margin_minutes must not be negative")

    def rows_per_rank(self, world_size: int) -> int:
        """Rows of one micro-step on one rank."""
        rows = self.batch_size // self.micro_steps
        if rows % world_size:
            raise ValueError(
                f"batch_size {self.batch_size} / micro_steps {self.micro_steps} = {rows} rows do not divide among "
                f"{world_size} ranks; change batch_size or micro_steps"
            )
        return rows // world_size

    def trajectory(self) -> dict[str, Any]:
        """The fields that decide the numbers of a run; a resume must not change them."""
        free = {
            "out", "log_every", "max_hours", "slurm_margin_minutes", "runtime", "checkpoint", "validation", "health",
            "init_from",
        }  # fmt: skip
        return {name: value for name, value in asdict(self).items() if name not in free}


def as_yaml(config: RunConfig) -> str:
    """The resolved configuration, every field of it, as YAML that `--config` reads back."""
    return yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False)


@dataclass(frozen=True, kw_only=True)
class TrainCommand(RunConfig):
    """Pretrain or fine-tune a recurrent-depth model.

    Args:
        resume: continue from the newest checkpoint in `out`, or start if there is none.
        accept_changed_data: resume although the data set has changed.
        dry_run: print the resolved configuration and stop.
    """

    resume: bool = False
    accept_changed_data: bool = False
    dry_run: bool = False

    def run_config(self) -> RunConfig:
        names = [field.name for field in dataclasses.fields(RunConfig)]
        return RunConfig(**{name: getattr(self, name) for name in names})


Method = Literal["ema", "uniform"]


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """Merge checkpoints of a run into one.

    Args:
        model: run folder; checkpoint.keep_last and checkpoint.keep_every decide what it holds.
        out: new run folder with the merged weights; it evaluates, exports and starts other runs (init_from).
        method: `ema` gives every checkpoint `decay` of the weight of the next newer one (the oldest one the rest),
            `uniform` the mean.
        decay: of `ema`.
        last: how many checkpoints are merged; null for all.
        every: take every n-th checkpoint, counted back from the newest.
    """

    model: str
    out: str
    method: Method = "ema"
    decay: float = 0.9
    last: int | None = None
    every: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay}; it must lie in [0, 1)")
        if self.every < 1 or (self.last is not None and self.last < 2):
            raise ValueError("every must be at least 1 and last at least 2 (or null)")
