"""Evaluate generated tasks at every position, by difficulty, and export them as multiple choice for lm-eval.

Shapes: B rows, T tokens (1 + instructions), R iterations.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from recurrent_depth.data.tasks.state import BUCKETS, TASKS, VALIDATION_SPLIT, StateTask, bucket_name
from recurrent_depth.evaluation.config import GeneratedConfig
from recurrent_depth.evaluation.table import Result
from recurrent_depth.files import write_text
from recurrent_depth.generation.engine import Decoder

LM_SUFFIX = "_lm"
"""Suffix of a generated task's name in lm-eval: shell_game_lm."""

_CACHE_BUDGETS = {"cache-full": None, "cache-1": 1}
_FIRST_LM_ROW = 1_000_000  # first row of the multiple-choice tasks, beyond those of evaluate_per_position


def check_tasks(option: str, names: Sequence[str]) -> None:
    """Raise unless every name is a generated task; `option` is what gave them."""
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise ValueError(f"{option} names {', '.join(unknown)}; known tasks are {', '.join(sorted(TASKS))}")


def check_model(name: str, tokenizer: Any, block_size: int, config: GeneratedConfig) -> None:
    """Raise unless the model was trained on tokens of the tasks and its block holds their rows."""
    if config.length + 1 > block_size:
        raise ValueError(
            f"generated.length is {config.length}; a row has one token more, and the block of {name} has {block_size}; "
            "lower generated.length"
        )
    for task in config.tasks:
        words = TASKS[task].vocabulary
        ids = [] if tokenizer is None else tokenizer.convert_tokens_to_ids(list(words))
        if ids != list(range(len(words))):
            raise ValueError(
                f"generated.tasks: {name} was not trained on {task}, its tokenizer has other tokens than {words[0]}, "
                f"{words[1]}, ...; give a model trained on the task (data.task.name: {task})"
            )


def evaluate_generated(
    model: Any, name: str, config: GeneratedConfig, num_steps: Sequence[int]
) -> Iterator[list[Result]]:
    """Yield the results of each task, mode and number of iterations."""
    for task in config.tasks:
        for mode in config.modes:
            for r in num_steps:
                yield evaluate_per_position(
                    model, name, TASKS[task], [r], length=config.length, rows=config.rows, modes=(mode,),
                    batch_size=config.batch_size,
                )  # fmt: skip


@torch.no_grad()
def evaluate_per_position(
    model: Any,
    name: str,
    task: StateTask,
    num_steps: Sequence[int],
    *,
    length: int = 16,
    rows: int = 512,
    seed: int = 0,
    modes: Sequence[str] = ("parallel",),
    batch_size: int = 512,
) -> list[Result]:
    """Return the accuracy of the predicted states, over all positions and by difficulty bucket.

    Args:
        model: a model of the training class or the transformers class.
        name: name of the model in the results.
        num_steps: numbers of iterations R.
        length: instructions per row.
        rows: rows of the validation split.
        modes: parallel (one pass), cache-full, cache-1 (token by token; with cache-1 every iteration reads the last
            entry of earlier tokens).
    """
    input_ids, labels = task.rows(0, rows, length, seed=seed, split=VALIDATION_SPLIT)  # [B, T]
    results = []
    for mode in modes:
        for r in num_steps:
            predicted = [predict(model, part, r, mode).cpu() for part in input_ids.split(batch_size)]
            correct = torch.cat(predicted) == labels  # [B, T]
            for difficulty, columns in _buckets(length).items():
                results.append(_result(name, task.name, difficulty, mode, r, correct[:, columns]))
    return results


def predict(model: Any, input_ids: Tensor, num_steps: int, mode: str) -> Tensor:
    """Return the most probable state at every position, [B, T]."""
    input_ids = input_ids.to(model.lm_head.weight.device)
    if mode == "parallel":
        return model(input_ids, num_steps=num_steps).logits.argmax(-1)
    return Decoder(model).logits(input_ids, num_steps, _CACHE_BUDGETS[mode]).argmax(-1)


def _buckets(length: int) -> dict[str, list[int]]:
    """Return the columns of each difficulty bucket. Position 0, the start state, is in no bucket."""
    buckets: dict[str, list[int]] = {"all": list(range(1, length + 1))}
    for difficulty in range(1, length + 1):
        buckets.setdefault(bucket_name(difficulty), []).append(difficulty)
    return buckets


def _result(model: str, task: str, difficulty: str, mode: str, r: int, correct: Tensor) -> Result:
    """Return the mean over positions and rows, with the standard error over rows: positions of a row are correlated."""
    by_row = correct.double().mean(1)
    n = len(by_row)
    stderr = by_row.std().item() / math.sqrt(n) if n > 1 else None
    return Result(
        model, "validation", task, difficulty, mode, "", None, "accuracy", r, by_row.mean().item(), stderr, n
    )  # fmt: skip


def export_task(task: StateTask, folder: Path, *, length: int = 16, rows_per_bucket: int = 256, seed: int = 0) -> str:
    """Write a task for lm-eval (a YAML and a JSONL per difficulty bucket up to `length`) and return its tag.

    Rows are multiple choice: the context is the start state and the instructions, the choices are the states.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tag = f"{task.name}{LM_SUFFIX}"
    for file in folder.glob(f"{tag}__*"):
        file.unlink()  # buckets of an earlier, longer export would still have the tag
    for first, last in BUCKETS:
        if first > length:
            break
        name = f"{tag}__{first}-{last}"
        rows = folder / f"{name}.jsonl"
        write_text(rows, "".join(_lm_rows(task, first, min(last, length), rows_per_bucket, seed)))
        write_text(folder / f"{name}.yaml", yaml.safe_dump(_lm_description(name, tag, rows, task)))
    return tag


def _lm_rows(task: StateTask, first: int, last: int, count: int, seed: int) -> list[str]:
    lines = []
    for index in range(count):
        length = first + index % (last - first + 1)
        ids, labels = task.rows(_FIRST_LM_ROW + index, 1, length, seed=seed, split=VALIDATION_SPLIT)
        row = {"context": task.text(ids[0].tolist()), "answer": int(labels[0, -1]), "instructions": length}
        lines.append(json.dumps(row) + "\n")
    return lines


def _lm_description(name: str, tag: str, rows: Path, task: StateTask) -> dict[str, object]:
    return {
        "task": name,
        "tag": [tag],
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": list(task.states),
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
