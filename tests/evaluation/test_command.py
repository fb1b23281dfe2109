"""`recurrent-depth eval` on the command line: what it accepts, refuses, writes and leaves unchanged."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from recurrent_depth.cli import main
from recurrent_depth.data.tasks.state import TASKS
from recurrent_depth.evaluation.table import read_csv
from recurrent_depth.hf.export import ExportConfig, export
from recurrent_depth.runs import load_run_model

FIXTURE = Path(__file__).parents[1] / "fixtures" / "huginn_tiny"
COLUMNS = [
    "model",
    "split",
    "task",
    "difficulty",
    "mode",
    "budget",
    "seed",
    "metric",
    "num_steps",
    "value",
    "stderr",
    "n",
]


def generated(model, out, *options):
    return main(["eval", "--model", str(model), "--out", str(out), "--generated.tasks", "[shell_game]",
                 "--generated.rows", "16", "--num-steps", "1,2", *options])  # fmt: skip


def values(out):
    return {(r.task, r.difficulty, r.mode, r.num_steps): r.value for r in read_csv(out / "results.csv")}


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return export(ExportConfig(str(run), str(tmp_path_factory.mktemp("exports") / "export")))


def test_run_checkpoint_and_export_give_the_same_values(run, exported, tmp_path, capsys):
    checkpoint = next((run / "checkpoints").glob("step-*12"))
    modes = ["--generated.modes", "[parallel, cache-full, cache-1]"]
    found = []
    for index, model in enumerate((run, checkpoint, exported)):
        assert generated(model, tmp_path / str(index), *modes) == 0, capsys.readouterr().err
        found.append(values(tmp_path / str(index)))
    assert found[0] == found[1] == found[2]
    assert {key[2] for key in found[0]} == {"parallel", "cache-full", "cache-1"}


def test_released_format_is_evaluated_like_a_run(tmp_path, capsys):
    """A Hugging Face folder in the released format; the accuracy equals that of its argmax logits."""
    folder = shutil.copytree(FIXTURE, tmp_path / "huginn")
    task = TASKS["shell_game"]
    task.tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert generated(folder, tmp_path / "out") == 0, capsys.readouterr().err
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids, labels = task.rows(0, 16, 16, seed=0, split=1)
    found = values(tmp_path / "out")
    for r in (1, 2):
        with torch.no_grad():
            right = model(ids, num_steps=r).logits.argmax(-1) == labels
        assert found["shell_game", "5-8", "parallel", r] == pytest.approx(right[:, 5:9].double().mean().item())


def test_eval_prints_what_runs_and_its_progress(run, tmp_path, capsys):
    assert generated(run, tmp_path / "out") == 0
    text = capsys.readouterr().err
    assert "eval: run on cpu in float32, 2 evaluations" in text
    assert "[1/2] shell_game, all, parallel, r=1: accuracy (%) " in text
    assert "[2/2] shell_game, all, parallel, r=2" in text


def test_dtype_of_eval_is_that_of_the_computation(run, tmp_path, capsys):
    assert generated(run, tmp_path / "out", "--dtype", "bfloat16") == 0
    assert "on cpu in bfloat16" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "results.json").read_text())["device"] == "cpu in bfloat16"


@pytest.mark.parametrize(
    ("gpus", "options", "expected"),
    [
        (1, [], ("cuda", torch.bfloat16, "auto")),
        (0, [], ("cpu", torch.float32, "auto")),
        (1, ["--device", "cpu", "--kernels", "torch"], ("cpu", torch.float32, "torch")),
        (2, ["--device", "cuda:1", "--dtype", "float32"], ("cuda:1", torch.float32, "auto")),
    ],
)
def test_eval_runs_on_the_accelerator_unless_told_otherwise(gpus, options, expected, tmp_path, monkeypatch, capsys):
    """The model is loaded once, with the chosen device, dtype and kernels."""
    asked = []

    def load_model(path, dtype, device, kernels, quantize):
        asked.append((str(device), dtype, kernels))
        raise ValueError("enough for this test")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("recurrent_depth.hf.loading.load_model", load_model)
    assert generated(tmp_path, tmp_path / "out", *options) == 1
    assert "enough for this test" in capsys.readouterr().err
    assert asked == [expected]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_eval_on_a_missing_gpu_is_refused(run, tmp_path, capsys):
    assert generated(run, tmp_path / "out", "--device", "cuda") == 1
    assert "torch sees 0 CUDA or ROCm device(s)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_earlier_results_are_replaced_only_when_asked(run, tmp_path, capsys):
    assert generated(run, tmp_path) == 0
    (tmp_path / "grid.csv").write_text("from an evaluation with budgets")
    before = (tmp_path / "results.csv").read_bytes()
    assert generated(run, tmp_path, "--generated.rows=8") == 1
    assert "add --overwrite true" in capsys.readouterr().err
    assert (tmp_path / "results.csv").read_bytes() == before
    assert generated(run, tmp_path, "--num-steps", "3", "--overwrite", "true") == 0
    assert {key[3] for key in values(tmp_path)} == {1, 2, 3}  # a list option that is repeated adds to the list
    assert not (tmp_path / "grid.csv").exists()


def test_out_that_is_a_file_is_refused(run, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert generated(run, tmp_path / "file") == 1
    assert "is a file; give a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("missing", "arguments", "message"),
    [
        ("lm_eval", ["--tasks", "arc_easy"], "eval --tasks needs the package lm_eval"),
        ("matplotlib", ["--generated.tasks", "[shell_game]"], "recurrent-depth[eval]"),
        (
            "math_verify",
            ["--budgets.questions.path", "q.jsonl", "--budgets.thinking-tokens", "[8]"],
            "eval --budgets.questions needs the package math_verify",
        ),
    ],
)
def test_missing_packages_are_named_before_anything_is_computed(missing, arguments, message, tmp_path):
    code = f"import sys; sys.modules[{missing!r}] = None; from recurrent_depth.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "eval", "--model", "nowhere", "--out", str(tmp_path / "out"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--generated.tasks", "[modular_arithmetic]"], "was not trained on modular_arithmetic"),
        (["--generated.length", "32"], "generated.length is 32; a row has one token more, and the block"),
    ],
)
def test_rows_that_the_model_cannot_read_are_refused(run, options, message, tmp_path, capsys):
    assert generated(run, tmp_path / "out", *options) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_dense_models_are_sent_to_lm_eval(tmp_path, capsys):
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    assert generated(tmp_path / "dense", tmp_path / "out") == 1
    assert "LlamaForCausalLM, not a recurrent-depth model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folders_of_lm_eval_tasks_must_exist(run, tmp_path, capsys):
    command = ["eval", "--model", str(run), "--out", str(tmp_path / "out"), "--tasks", "one"]
    assert main([*command, "--lm-eval.include-path", str(tmp_path / "nowhere")]) == 1
    assert "nowhere is not a folder" in capsys.readouterr().err


def test_names_with_special_characters_are_written_and_reported(run, tmp_path, capsys):
    """A backslash in a path, and a model name that matplotlib would take for mathematics."""
    out = tmp_path / "a\\b $x_{ $"
    assert generated(run, out, "--name", "r$x_{u$n\\") == 0, capsys.readouterr().err
    assert {r.model for r in read_csv(out / "results.csv")} == {"r$x_{u$n\\"}
    assert main(["report", "--out", str(out / "report.html"), "--results", json.dumps([str(out / "results.csv")])]) == 0
    assert "r$x_{u$n\\" in (out / "report.html").read_text()


@pytest.mark.slow
def test_three_sections_run_in_one_call_on_one_model(run, exported, tmp_path, capsys):
    """lm-eval tasks, generated tasks and questions in one call; the values equal those of a direct computation."""
    (tmp_path / "q.jsonl").write_text('{"question": "cup0 swap01", "answer": "cup1"}\n')
    spares = {f"{end}_{part}": f"swap{n}" for n, (end, part) in zip(("01", "02", "03", "04"), (
        ("begin", "think"), ("end", "think"), ("begin", "answer"), ("end", "answer")), strict=True)}  # fmt: skip
    form = json.dumps({"prompt": "{question}", "end_turn": "", "wait": "cup0", **spares})
    command = ["eval", "--model", str(exported), "--out", str(tmp_path / "out"), "--num-steps", "1,4"]
    command += ["--tasks", "shell_game_lm", "--lm-eval.limit", "40", "--lm-eval.length", "8"]
    command += ["--generated.tasks", "[shell_game]", "--generated.rows", "16"]
    command += ["--budgets.questions.path", str(tmp_path / "q.jsonl"), "--budgets.thinking-tokens", "[0, 4]"]
    assert main([*command, "--budgets.format", form, "--budgets.answer-tokens", "2"]) == 0, capsys.readouterr().err
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert {row["mode"] for row in rows} == {"parallel", "budget-forcing", "lm-eval"}
    assert {row["budget"] for row in rows if row["mode"] == "budget-forcing"} == {
        "tokens=0 waits=0",
        "tokens=4 waits=0",
    }
    model, task = load_run_model(run), TASKS["shell_game"]
    tokenizer = task.tokenizer()
    for row in (row for row in rows if row["mode"] == "lm-eval"):
        file = tmp_path / "out" / "tasks" / f"shell_game_lm__{row['difficulty']}.jsonl"
        documents = [json.loads(line) for line in file.read_text().splitlines()][:40]
        right = 0
        for document in documents:
            ids = torch.tensor([tokenizer.encode(document["context"]).ids])
            with torch.no_grad():
                logits = model(ids, num_steps=int(row["num_steps"])).logits[0, -1, : len(task.states)]
            right += int(logits.argmax()) == document["answer"]
        assert float(row["value"]) == pytest.approx(right / len(documents))
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["lm_eval"][0]["state_seed"] is None
    assert record["versions"]["lm_eval"]
    assert (tmp_path / "out" / "results.png").stat().st_size > 5000
    assert "| shell_game_lm | 5-8 |" in (tmp_path / "out" / "results.md").read_text()


def test_model_card_of_an_export_shows_the_evaluation(run, tmp_path):
    assert generated(run, tmp_path / "out") == 0
    results = tmp_path / "out" / "results.json"
    folder = export(ExportConfig(str(run), str(tmp_path / "export"), results=str(results)))
    card = (folder / "README.md").read_text()
    assert (tmp_path / "out" / "results.md").read_text() in card
    for foreign in ("{}", "not json", "[1]", '{"versions": [], "table": ""}'):
        results.write_text(foreign)
        with pytest.raises(ValueError, match=r"not a results\.json of `recurrent-depth eval`"):
            export(ExportConfig(str(run), str(tmp_path / "other"), results=str(results)))
        assert not (tmp_path / "other").exists()
