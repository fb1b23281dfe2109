"""Options of `recurrent-depth train-dense` and `average`. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from recurrent_depth.checks import check_at_least, check_between, check_not_empty
from recurrent_depth.data.config import PackedDataConfig
from recurrent_depth.training.config import RunConfig

AverageMethod = Literal["ema", "uniform"]


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """Fine-tune a dense transformers model with the recipe of a recurrent run, as its control.

    For several GPUs start it with torchrun; the rows of a micro-step are divided among the ranks.

    Args:
        run: configuration file of `recurrent-depth train`. The fields used are data.packed, steps, batch_size,
            micro_steps, seed, log_every, optimizer (adamw or muon), checkpoint.every, and runtime.device, runtime.dtype
            and runtime.activation_checkpointing. --run.steps 10 changes a single field.
        model: folder or hub name of the dense model.
        out: folder to write; the model is saved in `out`/model.
        data: packed rows prepared with the tokenizer of the dense model; null takes run.data.packed.
        resume: continue from the newest checkpoint in `out`.
    """

    run: RunConfig = field(metadata={"file": True})
    model: str
    out: str
    data: PackedDataConfig | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        check_not_empty("out", self.out, "--out runs/dense")
        if self.run.optimizer.name not in ("adamw", "muon"):
            raise ValueError(
                f"run.optimizer.name is {self.run.optimizer.name!r}; a dense model is trained with adamw or muon"
            )
        rows = self.rows
        if rows.document_masking and not rows.restart_positions:
            raise ValueError(
                "data.restart_positions is false; transformers separates packed examples by their positions: set it "
                "to true, with document_masking"
            )

    @property
    def rows(self) -> PackedDataConfig:
        """Return the packed rows to train on."""
        rows = self.data or self.run.data.packed
        if rows is None:
            raise ValueError("data is null and run.data is not packed; give a folder of packed rows with --data.path")
        return rows


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """Merge checkpoints of a run into one.

    Args:
        model: run folder; its checkpoint.keep_last and checkpoint.keep_every determine how many checkpoints it has.
        out: new run folder with the merged weights; it can be evaluated, exported, and used as init_from.
        method: `ema` gives each checkpoint `decay` times the weight of the next newer one (the oldest gets the rest);
            `uniform` is the mean.
        decay: weight of a checkpoint relative to the next newer one, for `ema`.
        last: number of checkpoints to merge; null for all.
        every: use every n-th checkpoint, counted back from the newest.
    """

    model: str
    out: str
    method: AverageMethod = "ema"
    decay: float = 0.9
    last: int | None = None
    every: int = 1

    def __post_init__(self) -> None:
        check_not_empty("out", self.out, "--out runs/average")
        check_between("decay", self.decay, 0, 1, high_open=True)
        check_at_least("last", self.last, 2)
        check_at_least("every", self.every, 1)
