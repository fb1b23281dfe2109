"""Options of `recurrent-depth plan`. Imports no torch."""

from dataclasses import dataclass, field, fields
from typing import Literal

from recurrent_depth.checks import check_at_least, check_between
from recurrent_depth.model.config import SHAPES, Checkpointing
from recurrent_depth.training.config import RunConfig

DeviceName = Literal["a100", "h100", "h200", "mi300x", "mi250x"]


@dataclass(frozen=True)
class FinetuningConfig:
    """The fine-tuning whose memory is planned.

    Args:
        shape: shape of the model: tiny, small, huginn-3.5b.
        backprop_depth: iterations with gradient (k).
        checkpointing: what the backward pass recomputes: nothing, each iteration (`step`), or each block.
        lora_rank: rank of LoRA, applied to every linear layer.
    """

    shape: str = "huginn-3.5b"
    backprop_depth: int = 8
    checkpointing: Checkpointing = "block"
    lora_rank: int = 16

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape is {self.shape!r}; it must be one of {', '.join(SHAPES)}")
        check_at_least("backprop_depth", self.backprop_depth, 1)
        check_at_least("lora_rank", self.lora_rank, 1)


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Plan the memory and time of a pretraining run (`--run FILE --num-gpus N`), or of fine-tuning (without `--run`).

    Args:
        run: configuration file of `recurrent-depth train`; --run.batch_size 64 changes a single field.
        num_gpus: GPUs of the run.
        device: GPU of the run; mi250x is one die.
        utilisation: executed FLOP/s (recomputation included) as a share of the dense bfloat16 peak.
        measured: training.json of `python -m benchmarks gpu`; the HFU of its best step of the nearest shape gives the
            time, beside `utilisation`; null: no measurement.
        tokens: tokens of a row; null takes run.model.block_size.
        finetuning: the fine-tuning to plan; not with `run`.
    """

    run: RunConfig | None = field(default=None, metadata={"file": True})
    num_gpus: int | None = None
    device: DeviceName = "h100"
    utilisation: float = 0.4
    measured: str | None = None
    tokens: int | None = None
    finetuning: FinetuningConfig = field(default_factory=FinetuningConfig)

    def __post_init__(self) -> None:
        check_at_least("num_gpus", self.num_gpus, 1)
        check_at_least("tokens", self.tokens, 1)
        check_between("utilisation", self.utilisation, 0, 1, low_open=True)
        if self.run is None:
            self._check_unused("num_gpus", "device", "utilisation", "measured", "tokens", needed="--run FILE")
            return
        self._check_unused("finetuning", needed="no --run")
        if self.num_gpus is None:
            raise ValueError("num_gpus is required to plan a run, for example --num-gpus 8")
        self.run.rows_per_rank(self.num_gpus)
        shard = self.run.runtime.shard_size or self.num_gpus
        if self.num_gpus % shard:
            raise ValueError(f"num_gpus is {self.num_gpus}; it must be a multiple of run.runtime.shard_size, {shard}")

    def _check_unused(self, *names: str, needed: str) -> None:
        for entry in fields(self):
            default = FinetuningConfig() if entry.name == "finetuning" else entry.default
            if entry.name in names and getattr(self, entry.name) != default:
                raise ValueError(f"{entry.name} is {getattr(self, entry.name)}; it needs {needed}")
