"""Options of `recurrent-depth plan`. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from recurrent_depth.data.config import PackedDataConfig, TaskDataConfig
from recurrent_depth.model.config import SHAPES, Checkpointing
from recurrent_depth.training.config import RunConfig

DeviceName = Literal["a100", "h100", "h200", "mi300x", "mi250x"]


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
    device: DeviceName = "h100"
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
        if self.backprop_depth < 1 or self.lora_rank < 1:
            raise ValueError("backprop_depth and lora_rank must be at least 1")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation is {self.utilisation}; it must lie in (0, 1]")
        if self.num_gpus is not None:
            self.rows_per_rank(self.num_gpus)
            shard = self.runtime.shard_size or self.num_gpus
            if self.num_gpus % shard:
                raise ValueError(f"runtime.shard_size {shard} does not divide num_gpus {self.num_gpus}")
