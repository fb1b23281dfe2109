"""Depth studies: their statistics against independent values, and the commands."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer

from recurrent_depth.analysis.studies.statistics import fit_law, rank_correlation, valid_range
from recurrent_depth.cli import main
from recurrent_depth.depth_range import DepthRange, store, warn_beyond
from recurrent_depth.evaluation.table import Result, write_csv
from recurrent_depth.training.launch import train
from support import small_run

STEPS = [1, 2, 4, 8, 16, 32]


def test_law_is_found_again():
    law = fit_law({r: 2.5 + 0.8 * math.exp(-(r - 1) / 5.0) for r in STEPS})
    assert law[:3] == pytest.approx((2.5, 0.8, 5.0), rel=1e-4)
    assert law.r_squared == pytest.approx(1)
    assert law.iterations_for(0.99) == pytest.approx(1 + 5 * math.log(100), rel=1e-3)
    noisy = fit_law({r: 2.5 + 0.8 * math.exp(-(r - 1) / 5.0) + 0.1 * (-1) ** n for n, r in enumerate(STEPS)})
    assert noisy.r_squared < 0.95
    with pytest.raises(ValueError, match="give at least 4"):
        fit_law({1: 2.0, 2: 1.0, 4: 0.5})


def test_valid_range_is_around_the_best():
    losses = {1: 3.0, 2: 2.01, 4: 2.0, 8: 2.005, 16: 2.3, 32: 2.0}
    assert valid_range(losses, 0.01) == (2, 8)
    assert valid_range(losses, 0.001) == (4, 4)
    assert valid_range(losses, 5) == (1, 32)


def test_rank_correlation_equals_scipy():
    random = np.random.default_rng(0)
    x = random.integers(0, 6, 200)
    y = x + random.integers(0, 6, 200)
    found = rank_correlation(x, y)
    assert found.value == pytest.approx(spearmanr(x, y).statistic)
    assert found.low < found.value < found.high
    unrelated = rank_correlation(x, random.permutation(y))
    assert unrelated.low < 0 < unrelated.high
    assert rank_correlation(x, np.zeros(200)).value == 0


def curve(path, name, values, stderr=0.005):
    """Write a results.csv with one curve over iterations."""
    write_csv(
        [Result(name, "validation", "game", "all", "parallel", "", None, "accuracy", r, value, stderr, 100)
         for r, value in values.items()], path,
    )  # fmt: skip
    return str(path)


def test_depths_study_warns_where_one_curve_misleads(tmp_path, capsys):
    shallow = curve(tmp_path / "a.csv", "a", {1: 0.30, 4: 0.80, 16: 0.81})
    deep = curve(tmp_path / "b.csv", "b", {1: 0.20, 4: 0.50, 16: 0.82})
    arguments = ["--depths.results", f"{shallow},{deep}", "--depths.trained", "4,16"]
    assert main(["study", "--out", str(tmp_path / "out"), *arguments]) == 0
    output = capsys.readouterr()
    assert "at r=4 the model trained at 4 has 80.0, the one trained at 16 only 50.0" in output.err
    assert "80.0" in output.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "depths.csv", "depths.md", "depths.png", "depths.svg",
    }  # fmt: skip
    equal = curve(tmp_path / "c.csv", "c", {1: 0.20, 4: 0.795, 16: 0.82})
    arguments[1] = f"{shallow},{equal}"
    assert main(["study", "--out", str(tmp_path / "again"), *arguments]) == 0
    assert "warning" not in capsys.readouterr().err


def test_loss_study_equals_direct_calls(chat_folder, tmp_path, capsys):
    text = "the quick brown fox jumps over the lazy dog. how many apples are there?"
    (tmp_path / "text.txt").write_text(text)
    arguments = ["--loss.model", str(chat_folder), "--loss.text-file", str(tmp_path / "text.txt"), "--device", "cpu"]
    steps = ["--loss.num-steps", "1,2,4,8"]
    assert main(["study", "--out", str(tmp_path / "out"), *arguments, *steps, "--dtype", "float32"]) == 0
    with (tmp_path / "out" / "loss.csv").open(newline="") as file:
        rows = {int(row["iterations"]): row for row in csv.DictReader(file)}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chat_folder), AutoTokenizer.from_pretrained(chat_folder)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    for r, row in rows.items():
        with torch.no_grad():
            output = model(ids, labels=ids, num_steps=r)
        assert float(row["loss"]) == pytest.approx(output.loss.item(), abs=1e-4)
        targets = ids[0, 1:16]
        first = torch.nn.functional.cross_entropy(output.logits[0, :15], targets)
        assert float(row["positions 1-15"]) == pytest.approx(math.exp(first.item()), abs=2e-3)
    law = json.loads((tmp_path / "out" / "law.json").read_text())
    assert set(law["law"]) == {"floor", "gain", "scale", "r_squared"}
    assert not (chat_folder / "depth-range.json").exists()


def test_stored_range_warns_beyond_it(tmp_path, capsys):
    assert store(tmp_path, DepthRange(2, 16, 8, 0.01, {2: 1.0, 8: 0.9, 16: 0.95, 32: 2.0})).is_file()
    warn_beyond(tmp_path, 2, 16)
    warn_beyond("some/hub-name", 400)
    assert capsys.readouterr().err == ""
    warn_beyond(tmp_path, 1, 8, 32)
    assert "num_steps 1, 32 is outside of the range 2 to 16" in capsys.readouterr().err
    (tmp_path / "depth-range.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged"):
        warn_beyond(tmp_path, 8)


@pytest.fixture(scope="module")
def game_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("game") / "run"
    train(small_run(run))
    return run


def test_range_of_a_run_is_stored_with_its_checkpoint_and_eval_warns(game_run, tmp_path, capsys):
    file = store(game_run, DepthRange(2, 4, 2, 0.01, {2: 1.0, 4: 1.0}))
    try:
        assert file.parent.name.startswith("step-")
        options = ["--generated.tasks", "shell_game", "--generated.rows", "4", "--generated.length", "4"]
        assert main(["eval", "--model", str(game_run), "--out", str(tmp_path), "--num-steps", "2,8", *options]) == 0
        assert "num_steps 8 is outside of the range 2 to 4" in capsys.readouterr().err
    finally:
        file.unlink()


def test_categories_of_a_generated_task(game_run, tmp_path, capsys):
    arguments = ["--categories.model", str(game_run), "--categories.task", "shell_game", "--categories.rows", "6"]
    more = [
        "--categories.length",
        "8",
        "--categories.num-steps",
        "6",
        "--categories.exits",
        "state-change=0.3,argmax=2",
    ]
    assert main(["study", "--out", str(tmp_path / "out"), *arguments, *more]) == 0
    text = capsys.readouterr().out
    assert "Rank correlation" in text
    with (tmp_path / "out" / "categories.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["category"], row["tokens"]) for row in rows] == [
        ("0", "6"),
        ("1-2", "12"),
        ("3-4", "12"),
        ("5-8", "24"),
    ]
    means = [float(row["argmax=2"]) for row in rows]
    assert all(2 <= mean <= 6 for mean in means)
    assert means == sorted(means)  # in order: a token never stops before an earlier one


def test_categories_of_texts(chat_folder, tmp_path, capsys):
    texts = [{"text": "the quick brown fox", "category": "animals"}, {"text": "7 apples", "category": "fruit"}]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    arguments = ["--categories.model", str(chat_folder), "--categories.texts", str(tmp_path / "texts.jsonl")]
    assert main(["study", "--out", str(tmp_path / "out"), *arguments, "--categories.num-steps", "5"]) == 0
    output = capsys.readouterr().out
    assert "animals" in output
    assert "fruit" in output
    assert "Rank correlation" not in output


@pytest.mark.slow
def test_fewshot_study_writes_a_table_by_examples_and_iterations(game_run, tmp_path, capsys):
    from recurrent_depth.data.tasks.state import TASKS
    from recurrent_depth.evaluation.generated import export_task

    export_task(TASKS["shell_game"], tmp_path / "tasks", length=4, rows_per_bucket=4)
    for file in (tmp_path / "tasks").glob("*.yaml"):
        file.write_text(file.read_text() + "fewshot_split: test\n")
    arguments = ["--fewshot.model", str(game_run), "--fewshot.tasks", "shell_game_lm__1-2", "--fewshot.shots", "0,1"]
    more = ["--fewshot.num-steps", "1,2", "--fewshot.include-path", str(tmp_path / "tasks"), "--fewshot.limit", "4"]
    assert main(["study", "--out", str(tmp_path / "out"), *arguments, *more]) == 0
    table = (tmp_path / "out" / "fewshot.md").read_text()
    assert "| 0 |" in table
    assert "| 1 |" in table
    assert list((tmp_path / "out").glob("fewshot-*.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "exactly one of depths, fewshot, categories, loss must be given"),
        (["--depths.results", "a.csv", "--depths.trained", "4"], "give at least two files"),
        (["--categories.model", "m"], "give exactly one of them"),
        (["--loss.model", "m", "--loss.text-file", "t", "--loss.num-steps", "0"], "every entry must be at least 1"),
    ],
)
def test_wrong_studies_are_errors(tmp_path, capsys, arguments, message):
    assert main(["study", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
