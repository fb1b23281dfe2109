"""Generated tasks as lm-eval tasks: a YAML and a JSONL for every difficulty bucket, no network needed."""

import json
from pathlib import Path

import yaml

from recurrent_depth.data.tasks.state import BUCKETS, StateTask
from recurrent_depth.evaluation.dense import VALIDATION_SPLIT


def export_task(task: StateTask, folder: Path, *, length: int = 16, rows_per_bucket: int = 256, seed: int = 0) -> str:
    """Write the task's buckets up to `length` instructions; returns the tag that names all of them in lm-eval.

    A row is multiple choice: the context is the start and the instructions, the choices are the states.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tag = f"{task.name}_lm"
    for first, last in BUCKETS:
        if first > length:
            break
        name = f"{tag}__{first}-{last}"
        rows = folder / f"{name}.jsonl"
        rows.write_text("".join(_rows(task, first, min(last, length), rows_per_bucket, seed)))
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(_description(name, tag, rows, task)))
    return tag


def _rows(task: StateTask, first: int, last: int, count: int, seed: int) -> list[str]:
    lines = []
    for index in range(count):
        length = first + index % (last - first + 1)
        ids, labels = task.rows(1_000_000 + index, 1, length, seed=seed, split=VALIDATION_SPLIT)
        row = {"context": task.text(ids[0].tolist()), "answer": int(labels[0, -1]), "instructions": length}
        lines.append(json.dumps(row) + "\n")
    return lines


def _description(name: str, tag: str, rows: Path, task: StateTask) -> dict[str, object]:
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
