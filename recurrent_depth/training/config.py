"""Options of `recurrent-depth train`. Imports no torch."""

import dataclasses
import json
from dataclasses import asdict, dataclass, field
from typing import Literal

import yaml

from recurrent_depth.checks import (
    check_at_least,
    check_between,
    check_each_at_least,
    check_fraction,
    check_not_empty,
    check_num_steps,
    check_positive,
)
from recurrent_depth.data.config import DataConfig
from recurrent_depth.model.config import Checkpointing, Kernels, ModelConfig
from recurrent_depth.training.objective_config import ObjectiveConfig

TrackerName = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its learning rate and its schedule.

    Args:
        name: `huginn` (arXiv 2502.05171, section 4.3: atan2 form, no epsilon, update clipping), `adamw` and `nadamw`
            (torch's, decoupled weight decay), or `muon` (matrices of the blocks by Muon, the rest by AdamW; q, k, v and
            gate, up are separate matrices).
        lr: peak learning rate, for example 0.0004.
        betas: decay rates of the two moments; for example 0.9,0.95.
        weight_decay: decay of matrices; norms and biases have none. For `huginn` it is multiplied by lr / peak lr, not
            by lr.
        eps: epsilon of adamw, nadamw and muon; `huginn` has none.
        momentum: momentum of `muon`.
        gradient_clip: largest global gradient norm; .inf for no clipping.
        schedule: after the warm-up: `trapezoid` (hold, then decay over cooldown_steps), `constant`, or `linear` and
            `cosine` decay to the end of the run.
        warmup_steps: training steps of the linear warm-up.
        cooldown_steps: training steps at the end of the run over which `trapezoid` decays linearly; 0 for none.
        final_lr: learning rate at the end of a decay, as a share of lr.
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
        check_positive("lr", self.lr)
        check_positive("gradient_clip", self.gradient_clip, infinite=True)
        for beta in self.betas:
            check_between("betas", beta, 0, 1, high_open=True)
        for name in ("weight_decay", "warmup_steps", "cooldown_steps"):
            check_at_least(name, getattr(self, name), 0)
        check_positive("eps", self.eps)
        check_between("momentum", self.momentum, 0, 1, high_open=True)
        check_fraction("final_lr", self.final_lr)
        if self.cooldown_steps and self.schedule != "trapezoid":
            raise ValueError(
                f"cooldown_steps is {self.cooldown_steps}; the schedule {self.schedule} has no cool-down: set it to 0, "
                "or schedule to trapezoid"
            )


@dataclass(frozen=True)
class DepthRampConfig:
    """A curriculum on depth: the mean recurrence grows from `start` to model.mean_recurrence.

    Args:
        start: mean recurrence of the first training step, in iterations.
        steps: training steps until the full mean.
        shape: `linear`, or `one_minus_sqrt` (1 - sqrt(1 - t)), which stays at low depths for longer.
        backprop: iterations with gradient grow too: they are at most the current mean, during the ramp and after it.
            Without it, sampling never takes a mean below model.mean_backprop_depth.
    """

    start: int = 1
    steps: int = 1000
    shape: Literal["linear", "one_minus_sqrt"] = "linear"
    backprop: bool = False

    def __post_init__(self) -> None:
        check_at_least("start", self.start, 1)
        check_at_least("steps", self.steps, 1)


@dataclass(frozen=True)
class DistillationConfig:
    """Learn from the next-token distribution of a teacher, in addition to the data.

    Its forward pass in every micro-step is counted neither in FLOPs nor in `plan`.

    Args:
        teacher: folder or hub name of the model, dense or recurrent, with the same vocabulary.
        weight: share of the divergence from the teacher in the loss; the rest is the cross-entropy of the data.
        temperature: divisor of the logits of teacher and student in the divergence.
    """

    teacher: str
    weight: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        check_not_empty("teacher", self.teacher, "--distillation.teacher FOLDER")
        check_fraction("weight", self.weight)
        check_positive("temperature", self.temperature)


@dataclass(frozen=True)
class RuntimeConfig:
    """How a run uses its machine; never part of the architecture.

    Args:
        device: `auto` takes a GPU (CUDA or ROCm) if there is one.
        dtype: of the forward and backward pass; `auto` is bfloat16 on a GPU and float32 on a CPU. Weights, optimizer
            and gradient reductions stay float32.
        shard_size: ranks that share one copy of the weights; null: all ranks (FSDP). 1 is plain replication, values
            in between are hybrid sharding.
        reshard_after_forward: free gathered weights after the forward pass (ZeRO-3) instead of keeping them (ZeRO-2).
        activation_checkpointing: recompute each `block` or each whole iteration (`step`) in the backward pass.
        float8: linear layers of the core multiply in float8 (torchao, one scale per row); needs the package torchao, a
            GPU of compute capability 8.9, MI300 or newer, and bfloat16.
        compile: torch.compile each block (never the loop).
        kernels: implementation of the element-wise operations; `auto` is `triton` on a GPU and `torch` on a CPU.
        loss_chunk_size: tokens whose logits are computed at a time, to save memory; null: all.
        threads: CPU threads of each process; null keeps torch's default.
        timeout_minutes: minutes that a rank waits for the others in a collective before the run is aborted.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    shard_size: int | None = None
    reshard_after_forward: bool = False
    activation_checkpointing: Checkpointing = "none"
    float8: bool = False
    compile: bool = False
    kernels: Kernels = "auto"
    loss_chunk_size: int | None = None
    threads: int | None = None
    timeout_minutes: float = 10.0

    def __post_init__(self) -> None:
        for name in ("shard_size", "loss_chunk_size", "threads"):
            check_at_least(name, getattr(self, name), 1)
        check_positive("timeout_minutes", self.timeout_minutes)


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep.

    Args:
        every: training steps between checkpoints; the last step is always saved.
        keep_last: newest checkpoints kept.
        keep_every: checkpoints whose step is a multiple of this are never removed; null: no such checkpoints.
        background: continue training while files are written; needs a second copy of the state in CPU memory.
    """

    every: int = 1000
    keep_last: int = 2
    keep_every: int | None = None
    background: bool = True

    def __post_init__(self) -> None:
        for name in ("every", "keep_last", "keep_every"):
            check_at_least(name, getattr(self, name), 1)


@dataclass(frozen=True)
class RunExportConfig:
    """When to write RUN/exports/step-N, a Hugging Face folder that `recurrent-depth export` makes of a checkpoint.

    Args:
        every: export every n-th checkpoint; null: none.
        at_end: export the last checkpoint of a finished run.
        dtype: dtype of the exported weights.
    """

    every: int | None = None
    at_end: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        check_at_least("every", self.every, 1)


@dataclass(frozen=True)
class ValidationConfig:
    """The loss on held-out rows.

    Args:
        every: training steps between validations; the last step always has one.
        rows: held-out rows, over all ranks.
        num_steps: iterations at which the loss is measured, for example 1,4,8; 1 and the mean depth are always
            included.
    """

    every: int = 500
    rows: int = 256
    num_steps: tuple[int, ...] = (1, 4, 8, 16, 32, 64)

    def __post_init__(self) -> None:
        check_at_least("every", self.every, 1)
        check_at_least("rows", self.rows, 1)
        check_each_at_least("num_steps", self.num_steps, 1)
        check_num_steps("num_steps", *self.num_steps)


@dataclass(frozen=True)
class HealthConfig:
    """Limits of the health checks, which run with every validation.

    Args:
        collapse_correlation: token correlation (-1 to 1) above which the states count as collapsed.
        collapse_checks: checks in a row above that limit before the run is aborted.
        ignored_state_gap: relative difference between the loss at one iteration and at the mean depth, below which the
            state counts as ignored.
        ignored_state_checks: checks in a row (after warm-up) below that difference before the warning.
        skipped_steps: training steps in a row with a non-finite loss or gradient before the run is aborted.
    """

    collapse_correlation: float = 0.99
    collapse_checks: int = 3
    ignored_state_gap: float = 0.01
    ignored_state_checks: int = 5
    skipped_steps: int = 10

    def __post_init__(self) -> None:
        check_between("collapse_correlation", self.collapse_correlation, -1, 1)
        check_between("ignored_state_gap", self.ignored_state_gap, -1, 1)
        for name in ("collapse_checks", "ignored_state_checks", "skipped_steps"):
            check_at_least(name, getattr(self, name), 1)


@dataclass(frozen=True)
class SpikeConfig:
    """When a loss counts as a spike, and how often a run may go back to an earlier checkpoint.

    Args:
        factor: a loss above this multiple of the median of the last losses is a spike, for example 1.5; null turns the
            guard off.
        window: number of losses of the median; until there are that many, no loss counts as a spike.
        margin: training steps that must lie between the checkpoint and the spike, since its cause is often earlier
            than the spike itself.
        max_rewinds: how often one run may go back; another spike aborts it.
    """

    factor: float | None = None
    window: int = 128
    margin: int = 0
    max_rewinds: int = 5

    def __post_init__(self) -> None:
        check_between("factor", self.factor, 1, float("inf"), low_open=True, high_open=True)
        check_at_least("window", self.window, 1)
        check_at_least("margin", self.margin, 0)
        check_at_least("max_rewinds", self.max_rewinds, 0)


@dataclass(frozen=True)
class RunConfig:
    """One training run.

    Args:
        out: run folder.
        data: where rows come from: packed rows on disk, a generated task, or generated puzzles.
        model: shape of the model; in a file also the name of another file, for example model/tiny.yaml.
        steps: training steps of the whole run.
        batch_size: rows of one training step, over all ranks.
        micro_steps: parts into which a training step is split (gradient accumulation); each samples its own depth. The
            rows of a part are divided among the ranks, so the number of ranks changes neither data nor depths.
        seed: seed of weights, data order, depths and initial states.
        log_every: training steps between lines of metrics.jsonl.
        trackers: where the numbers of metrics.jsonl go as well: tensorboard, wandb, trackio; for example
            tensorboard,wandb. null: tensorboard if it is installed; [] none.
        profile: write a torch.profiler trace of three training steps to RUN/profile, after the first five.
        max_hours: hours after which the run saves and stops; null for no limit.
        slurm_margin_minutes: under Slurm, minutes before the end of the job (SLURM_JOB_END_TIME) at which the run saves
            and stops.
        depth_ramp: a curriculum on depth; null samples around model.mean_recurrence from the first training step.
        distillation: a teacher to learn from; null: the data alone.
        objective: what a training step minimises; the default is the loss after the last iteration (Huginn).
        trainable: `all` trains everything; `adapter` trains the adapter and `gate` the exit gate, and both keep all
            other weights.
        init_from: a run, checkpoint, export, Huginn folder or hub name whose weights to start from; null starts from
            random weights.
        optimizer: the optimizer, its learning rate and its schedule.
        runtime: device, precision, sharding, recomputation.
        checkpoint: when to save and what to keep.
        export: which checkpoints to export as Hugging Face folders.
        validation: the loss on held-out rows.
        health: limits of the health checks.
        spikes: what to do about loss spikes.
    """

    out: str
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    steps: int = 1000
    batch_size: int = 32
    micro_steps: int = 1
    seed: int = 0
    log_every: int = 10
    trackers: tuple[TrackerName, ...] | None = None
    profile: bool = False
    max_hours: float | None = None
    slurm_margin_minutes: float = 5.0
    depth_ramp: DepthRampConfig | None = None
    distillation: DistillationConfig | None = None
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    trainable: Literal["all", "adapter", "gate"] = "all"
    init_from: str | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: RunExportConfig = field(default_factory=RunExportConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    spikes: SpikeConfig = field(default_factory=SpikeConfig)

    def __post_init__(self) -> None:
        check_not_empty("out", self.out, "--out runs/first")
        for name in ("steps", "batch_size", "micro_steps", "log_every"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("seed", self.seed, 0)
        if self.batch_size % self.micro_steps:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be a multiple of micro_steps, which is {self.micro_steps}"
            )
        check_positive("max_hours", self.max_hours)
        check_at_least("slurm_margin_minutes", self.slurm_margin_minutes, 0)
        if self.optimizer.cooldown_steps > self.steps:
            raise ValueError(
                f"optimizer.cooldown_steps is {self.optimizer.cooldown_steps}; it must be at most steps, which is "
                f"{self.steps}"
            )
        if self.depth_ramp is not None and self.depth_ramp.start > self.model.mean_recurrence:
            raise ValueError(
                f"depth_ramp.start is {self.depth_ramp.start}; it must be at most model.mean_recurrence, which is "
                f"{self.model.mean_recurrence}"
            )
        if self.objective.name != "last" and self.distillation is not None:
            raise ValueError(
                f"distillation and objective.{self.objective.name} are given; distillation works with the objective "
                "last only: leave one out"
            )
        self.objective.check_gate(self.model.gate is not None, self.trainable)

    def rows_per_rank(self, world_size: int) -> int:
        """Return the rows of one micro-step on one rank."""
        rows = self.batch_size // self.micro_steps
        if rows % world_size:
            raise ValueError(
                f"batch_size {self.batch_size} / micro_steps {self.micro_steps} = {rows} rows do not divide among "
                f"{world_size} ranks; change batch_size or micro_steps"
            )
        return rows // world_size


def as_yaml(config: RunConfig) -> str:
    """Return all fields of the configuration as YAML that `--config` can read."""
    return yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False)


@dataclass(frozen=True, kw_only=True)
class TrainCommand(RunConfig):
    """Pretrain or fine-tune a recurrent-depth model.

    Args:
        resume: continue from the newest checkpoint in `out`, or start if there is none.
        accept_changed_data: resume although the data set has changed.
        dry_run: print the resolved configuration and exit.
    """

    resume: bool = False
    accept_changed_data: bool = False
    dry_run: bool = False

    def run_config(self) -> RunConfig:
        """Return the configuration of the run, without resume, accept_changed_data and dry_run."""
        names = [field.name for field in dataclasses.fields(RunConfig)]
        return RunConfig(**{name: getattr(self, name) for name in names})
