"""Options of verbs whose code imports torch or transformers, so that their help imports neither."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from recurrent_depth.checks import check_at_least, check_num_steps

_SIZE = re.compile(r"[1-9]\d*\s*([KMGT]B)?", re.IGNORECASE)


def check_size(name: str, value: str) -> None:
    """Raise unless `value` is a size such as 5GB."""
    if not _SIZE.fullmatch(value):
        raise ValueError(f"{name} is {value!r}; give a size such as 500MB or 5GB")


@dataclass(frozen=True)
class ExportConfig:
    """Export a model as a Hugging Face folder in the released Huginn format.

    Args:
        model: run folder, checkpoint, export, Hugging Face folder or hub name.
        out: folder to write; it must not exist, or be empty.
        dtype: dtype of the weights; the rotary table stays in float32.
        max_shard_size: largest size of a file of weights, for example 5GB; larger weights are split.
        results: results.json of `recurrent-depth eval`, for the model card and the table of `reasoning_effort`; null: a
            card without evaluation.
        format: `huginn`, which transformers loads with the code in the folder, or `retrofit`, the format of released
            retrofitted models (weights and config.json without code), for converted models.
    """

    model: str
    out: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_shard_size: str = "5GB"
    results: str | None = None
    format: Literal["huginn", "retrofit"] = "huginn"

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model is empty; give the folder of a run or an export, or a hub name")
        check_size("max_shard_size", self.max_shard_size)


@dataclass(frozen=True)
class ConvertConfig:
    """Turn a dense model into a recurrent one: some layers become the prelude, some the core, some the coda.

    The adapter is new. At one iteration the result computes what the dense model computes (with `random` it does not),
    and the command compares their logits before it writes.

    Args:
        model: dense model of the Llama, Mistral, Qwen2, Qwen3 or OLMo-2 family: Hugging Face folder or hub name.
        out: folder to write; it must not exist, or be empty.
        prelude: layers of the prelude, the first of the dense model.
        core: layers of the core.
        coda: layers of the coda, the last of the dense model.
        layers: which layers between prelude and coda become the core: `all`; `last`, those before the coda, as in the
            released models; `influence`, those that change the hidden states most; `angular`, all but the neighbouring
            ones that change them least.
        core_layers: indices of the core's layers, instead of `layers`; for example 10,11,12,13.
        text: text file on which `influence` and `angular` are measured; at least 256 tokens, 4,096 are used.
        init: the adapter: `identity` (exact at one iteration), `input_only` (exact at any number of iterations, but the
            state is ignored until training changes that), `random` (as in the released models; exact at none).
        seed: seed of the random adapter.
        mean_recurrence: mean of the iterations sampled in later training, and the default number at test time.
        mean_backprop_depth: last iterations that carry gradient in later training; null: all.
        dtype: dtype of the written weights; the comparison is in float32.
        max_shard_size: largest size of a file of weights, for example 5GB; larger weights are split.
    """

    model: str
    out: str
    prelude: int
    core: int
    coda: int
    layers: Literal["all", "last", "influence", "angular"] = "all"
    core_layers: tuple[int, ...] | None = None
    text: str | None = None
    init: Literal["identity", "input_only", "random"] = "identity"
    seed: int = 0
    mean_recurrence: int = 4
    mean_backprop_depth: int | None = 4
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_shard_size: str = "5GB"

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model is empty; give the folder of a dense model, or a hub name")
        for name in ("prelude", "core", "coda", "mean_backprop_depth"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("seed", self.seed, 0)
        check_num_steps("mean_recurrence", self.mean_recurrence)
        if self.core_layers is None and self.layers in ("influence", "angular") and self.text is None:
            raise ValueError(f"text is missing; layers {self.layers} is measured on a text: give a text file")
        if self.text is not None and not Path(self.text).is_file():
            raise ValueError(f"text: no such file {self.text!r}")
        check_size("max_shard_size", self.max_shard_size)
