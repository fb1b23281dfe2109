"""The report of small runs and evaluations: one page, labelled numbers, statements computed from the runs."""

import base64
import dataclasses
import json
import re
import shutil

import pytest
from PIL import Image

from recurrent_depth.cli import main
from recurrent_depth.evaluation.report import sections, summarise, training_times
from recurrent_depth.evaluation.table import Result, write_csv
from support import records


def result(model="ours", num_steps=1, **changes):
    defaults = {
        "split": "validation", "task": "shell_game", "difficulty": "1-2", "mode": "parallel", "budget": "",
        "seed": None, "metric": "accuracy", "value": 0.5, "stderr": 0.01, "n": 64,
    }  # fmt: skip
    return Result(model=model, num_steps=num_steps, **(defaults | changes))


def swept(**changes):
    return [result(num_steps=r, value=r / 10, **changes) for r in (1, 4, 8)]


def page(tmp_path, *arguments):
    out = tmp_path / "report.html"
    assert main(["report", "--out", str(out), *arguments]) == 0
    return out.read_text()


def test_report_is_one_page_without_references_that_names_date_and_seed(run, tmp_path):
    write_csv([*swept(), result("baseline")], tmp_path / "results.csv")
    text = page(tmp_path, "--runs", str(run), "--results", str(tmp_path / "results.csv"), "--note", "A <b>note</b>.")
    assert "http://" not in text
    assert "https://" not in text
    assert "A &lt;b&gt;note&lt;/b&gt;." in text
    assert re.search(r"Written \d{4}-\d\d-\d\d by recurrent-depth", text)
    assert "<tr><td>seed</td><td>0</td></tr>" in text
    assert "Training loss: run" in text
    assert "validation loss" in text
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".csv"] == ["report.html"]


def test_pictures_are_narrow_enough_for_a_phone(tmp_path):
    """At a width of 360 CSS pixels, text of 10 points in a figure of 6 inches is at least 8 pixels high."""
    write_csv(swept(), tmp_path / "results.csv")
    encoded = re.search(r"base64,([^\"]+)", page(tmp_path, "--results", str(tmp_path / "results.csv"))).group(1)
    (tmp_path / "chart.png").write_bytes(base64.b64decode(encoded))
    width, height = Image.open(tmp_path / "chart.png").size
    assert width / 150 <= 6  # inches at 150 dots per inch
    assert height >= width / 2


def test_model_and_baselines_are_in_one_chart():
    results = [
        *(r for difficulty in ("9-12", "1-2", "all") for r in swept(difficulty=difficulty)),
        *(r for r in swept(mode="cache-1")),
        *(result("depth-1", difficulty=difficulty, value=0.2) for difficulty in ("1-2", "9-12", "all")),
    ]
    (section,) = sections(results)
    assert section["title"] == "shell_game: accuracy"
    assert section["chart"] is not None
    assert "Curves: ours" in section["caption"]
    assert "Horizontal lines: depth-1" in section["caption"]
    assert "Mode: parallel" in section["caption"]
    assert "one standard error over 64 rows" in section["caption"]
    assert section["depths"] == [1, 4, 8]
    assert list(section["groups"]) == ["ours (parallel)", "ours (cache-1)", "depth-1 (parallel)"]
    assert [line for line, _ in section["groups"]["ours (parallel)"]] == ["1-2", "9-12", "all"]


def test_chart_without_curves_is_left_out():
    (section,) = sections([result("a"), result("b")])
    assert section["chart"] is None


def test_every_metric_has_a_section_of_its_own(tmp_path):
    results = [
        result(num_steps=r, task="sciq", difficulty="", metric=metric, mode="lm-eval", value=value)
        for metric, value in (("acc", 0.25), ("acc_norm", 0.75), ("word_perplexity", 23.5))
        for r in (1, 4)
    ]
    write_csv(results, tmp_path / "results.csv")
    text = page(tmp_path, "--results", str(tmp_path / "results.csv"))
    for title, unit, shown in (
        ("acc", "percent", "25.0"), ("acc_norm", "percent", "75.0"), ("word_perplexity", "word_perplexity", "23.5")
    ):  # fmt: skip
        part = text.split(f"<h2>{title} by task</h2>")[1].split("<h2>")[0]
        assert f"<th>{unit}, by iterations</th>" in part
        assert f"<tr><td>sciq</td><td>{shown}</td><td>{shown}</td></tr>" in part


def test_training_times_are_those_of_the_runs(run):
    first = summarise(run)
    others = [
        dataclasses.replace(first, name=name, seconds=ratio * first.seconds)
        for name, ratio in (("a", 1.34), ("b", 0.5))
    ]
    other_data = dataclasses.replace(first, name="text", data="{}")
    (sentence,) = training_times([first, *others, other_data])
    assert sentence.endswith(f"relative to run ({first.seconds:.0f} s): a 1.34, b 0.50.")
    assert training_times([first, other_data]) == []


def test_summary_adds_up_the_records_of_a_run(run):
    train = records(run)
    summary = summarise(run)
    assert summary.steps == 12
    assert summary.seconds == pytest.approx(sum(record["seconds"] for record in train))
    assert summary.tokens == sum(record["tokens"] for record in train)
    assert [loss for _, loss in summary.losses] == [record["loss"] for record in train]
    assert set(summary.validation_loss) == {1, 4}
    assert summary.parameters == 32 * 64 + 2 * 32 * 32 + 3 * (4 * 32 * 32 + 3 * 32 * 64 + 4 * 32 + 2 * 32) + 32


def test_bits_per_byte_follow_from_the_manifest(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (tmp_path / "data").mkdir()
    split = {"bytes": 300, "tokens_kept": 90, "tokens_dropped": 10}
    (tmp_path / "data" / "manifest.json").write_text(json.dumps({"splits": {"validation": split}}))
    (copy / "run.yaml").write_text(f"seed: 3\ndata: {{path: {tmp_path / 'data'}}}\n")
    summary = summarise(copy)
    assert (summary.seed, summary.bytes_per_token) == (3, 3.0)
    assert summary.bits_per_byte(2.0) == "0.962"  # 2 nats = 2.885 bits per token of 3 bytes
    assert summarise(run).bits_per_byte(2.0) == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no training records"),
        ('{"type": "validation", "loss_1": 1}\n', "has no training records"),
        ("not json\n", "cannot be read"),
        ("[1, 2]\n", "a line is not a record of a run"),
        (None, "cannot be read"),
    ],
)
def test_runs_without_training_records_are_refused(run, content, message, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "metrics.jsonl").unlink()
    if content is not None:
        (copy / "metrics.jsonl").write_text(content)
    assert main(["report", "--out", str(tmp_path / "new" / "r.html"), "--runs", str(copy)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_two_models_of_one_name_are_refused(tmp_path, capsys):
    for name in ("a", "b"):
        write_csv([*swept(), result(name)], tmp_path / f"{name}.csv")
    files = f"{tmp_path / 'a.csv'},{tmp_path / 'b.csv'}"
    assert main(["report", "--out", str(tmp_path / "r.html"), "--results", files]) == 1
    assert "both have shell_game of the model ours; evaluate one of them with another --name" in capsys.readouterr().err


def test_report_on_other_csv_files_is_refused(tmp_path, capsys):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert main(["report", "--out", str(tmp_path / "r.html"), "--results", str(tmp_path / "other.csv")]) == 1
    assert "has the columns a, b" in capsys.readouterr().err
    assert main(["report", "--out", str(tmp_path), "--results", str(tmp_path / "other.csv")]) == 1
    assert "is a folder; give an HTML file" in capsys.readouterr().err
