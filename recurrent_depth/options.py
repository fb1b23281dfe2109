"""Options of verbs whose code imports torch or transformers, so that their help imports neither."""

import re
from dataclasses import dataclass
from typing import Literal

_SIZE = re.compile(r"[1-9]\d*\s*([KMGT]B)?", re.IGNORECASE)


@dataclass(frozen=True)
class ExportConfig:
    """Export a model as a Hugging Face folder in the released Huginn format.

    Args:
        model: run folder, checkpoint, export, Hugging Face folder or hub name.
        out: folder to write; it must not exist, or be empty.
        dtype: dtype of the weights; the rotary table stays in float32.
        max_shard_size: largest size of a file of weights, for example 5GB; larger weights are split.
        results: results.json of `recurrent-depth eval`, for the model card; null: a card without evaluation.
    """

    model: str
    out: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_shard_size: str = "5GB"
    results: str | None = None

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model is empty; give the folder of a run or an export, or a hub name")
        if not _SIZE.fullmatch(self.max_shard_size):
            raise ValueError(f"max_shard_size is {self.max_shard_size!r}; give a size such as 500MB or 5GB")
