"""The configuration of a run: every part lives beside its component, this page puts them together."""

import json
from dataclasses import asdict, dataclass, field

import yaml

from recurrent_depth.data.loader import PackedDataConfig, TaskDataConfig, ThinkingDataConfig
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.training.health import HealthConfig
from recurrent_depth.training.optimizer import OptimizerConfig
from recurrent_depth.training.parallel import RuntimeConfig
from recurrent_depth.training.rewind import SpikeConfig
from recurrent_depth.training.saving import CheckpointConfig
from recurrent_depth.training.schedule import DepthRampConfig
from recurrent_depth.training.validation import ValidationConfig


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


def as_yaml(config: RunConfig) -> str:
    """The resolved configuration, every field of it, as YAML that `--config` reads back."""
    return yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False)
