"""`curate` from pool to report: funnel, dropped rows, cache, errors, a killed run and the shipped recipes."""

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from recurrent_depth.cli import main
from recurrent_depth.data.layout import DataError
from recurrent_depth.errors import UserError
from recurrent_depth.files import FolderInUseError, folder_lock
from recurrent_depth.parsing import parse_options
from recurrent_depth.reasoning.config import CurateConfig, SourceConfig
from recurrent_depth.reasoning.curation.command import curate
from recurrent_depth.reasoning.curation.stages import STAGES as STAGES_KNOWN
from recurrent_depth.reasoning.curation.stages import Outcome, Stage, build_stage, stage
from recurrent_depth.reasoning.pool import COLUMNS, read_examples

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "configs" / "curate").glob("*.yaml"))
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
STAGES = [
    {"stage": "exact_duplicates"},
    {"stage": "decontaminate", "against": [{"path": "test.jsonl"}], "n": 4},
    {"stage": "quality"},
    {"stage": "difficulty", "models": [{"name": "small", "recorded": "attempts.jsonl"}]},
    {"stage": "lengths", "tokenizer": "TOKENIZER"},
    {"stage": "domains"},
    {"stage": "diverse", "size": 4},
]


@pytest.fixture
def data(tmp_path, chat_folder):
    """Return a folder with a pool of twenty questions. Rows 0 to 5 have one fault each."""
    rows = [
        {
            "question": f"How many apples are {i} and {i} apples?",
            "answer": str(2 * i),
            "trace": f"the {i} fox " * (i % 5 + 1),
            "domain": "ab"[i % 2],
        }
        for i in range(20)
    ]
    rows[0]["question"] = rows[10]["question"].upper()
    rows[1]["question"] = "Say what is seven times seven?"
    rows[2]["trace"] = ""
    rows[4]["domain"] = None
    rows[5]["answer"] = ""
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "pool.jsonl", rows)
    write(folder / "test.jsonl", [{"question": "Now, what is seven times seven?"}])
    write(folder / "attempts.jsonl", [{"id": f"pool/{i}", "attempt": "6.0" if i == 3 else "-1"} for i in range(20)])
    return folder


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def recipe(data, out, chat_folder, stages=STAGES, **changes):
    stages = [
        {k: str(chat_folder) if v == "TOKENIZER" else v for k, v in description.items()} for description in stages
    ]
    return CurateConfig(out=str(out), pool=[SourceConfig("pool.jsonl")], stages=stages, root=str(data), **changes)


def contents(out):
    return {file.name: file.read_bytes() for file in sorted(out.iterdir()) if file.is_file()}


def test_curation_accounts_for_every_row(data, tmp_path, chat_folder, capsys):
    manifest = curate(recipe(data, tmp_path / "out", chat_folder, note="Made up."))
    rows, out = read_examples(tmp_path / "out"), tmp_path / "out"
    dropped = pq.read_table(out / "dropped.parquet").to_pylist()
    assert len(rows) == manifest["rows"] == 4
    assert sorted([row.id for row in rows] + [row["id"] for row in dropped]) == sorted(f"pool/{i}" for i in range(20))
    first = {row["id"]: (row["stage"], row["reason"]) for row in dropped if row["reason"] != "not selected"}
    assert first == {
        "pool/5": ("load", "no answer"),
        "pool/10": ("exact_duplicates", "duplicate question"),
        "pool/1": ("decontaminate", "overlaps test"),
        "pool/2": ("quality", "no trace"),
        "pool/3": ("difficulty", "solved by small"),
        "pool/4": ("domains", "no domain"),
    }
    funnel = [(step["rows_in"], step["rows_out"]) for step in manifest["steps"]]
    assert funnel == [(20, 19), (19, 18), (18, 17), (17, 16), (16, 15), (15, 15), (15, 14), (14, 4)]
    assert all(step["rows_in"] - step["rows_out"] == sum(step["reasons"].values()) for step in manifest["steps"])
    assert pq.read_schema(out / "examples.parquet").names == list(COLUMNS)
    for name in ("report.md", "report.html"):
        page = (out / name).read_text()
        for text in ("Made up.", "overlaps test", "solved by small", "diverse", rows[0].domain):
            assert text in page
    assert (out / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert "difficulty: 16 -> 15  (solved by small: 1)" in capsys.readouterr().err


def test_curation_report_escapes_text_of_rows(data, tmp_path, chat_folder):
    pool = [json.loads(line) for line in (data / "pool.jsonl").read_text().splitlines()]
    pool[7]["question"] += " <script>alert(1)</script> | a | b"
    write(data / "pool.jsonl", pool)
    curate(recipe(data, tmp_path / "out", chat_folder, STAGES[:3]))
    assert "<script>" not in (tmp_path / "out" / "report.html").read_text()
    lines = (tmp_path / "out" / "report.md").read_text().splitlines()
    assert {line.replace(r"\|", "").count("|") for line in lines if line.startswith("|")} <= {5, 6}


def test_curation_repeats_only_stages_affected_by_a_change(data, tmp_path, chat_folder):
    cache = tmp_path / "cache" / "stages"

    def run(out="out", stages=STAGES, **changes):
        before = set(cache.iterdir()) if cache.exists() else set()
        curate(recipe(data, tmp_path / out, chat_folder, stages, cache=str(tmp_path / "cache"), **changes))
        new = {place.name[:-17] for place in set(cache.iterdir()) - before}
        return [description["stage"] for description in stages if description["stage"] in new], contents(tmp_path / out)

    everything = [description["stage"] for description in STAGES]
    first = run()
    assert first[0] == everything
    assert run() == ([], first[1])
    assert run("elsewhere") == ([], first[1])
    assert run(stages=[*STAGES[:-1], {"stage": "random", "size": 4}])[0] == ["random"]
    assert run(stages=[STAGES[1], *STAGES[2:]])[0] == everything[1:]
    assert run(seed=1)[0] == everything
    attempts = data / "attempts.jsonl"
    attempts.write_text(attempts.read_text().replace("-1", "-2"))
    assert run()[0] == ["difficulty"]  # its output rows are the same, so later stages come from the cache
    write(data / "test.jsonl", [{"question": "Something else"}])
    assert run()[0][0] == "decontaminate"


DEADLY = """
import os, pathlib, signal
from dataclasses import dataclass
from recurrent_depth.reasoning.curation.stages import Outcome, Stage, stage

@stage("deadly")
@dataclass(frozen=True)
class Deadly(Stage):
    def apply(self, examples, context):
        if not pathlib.Path("alive").exists():
            pathlib.Path("alive").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Outcome(examples[:-1], [context.drop(examples[-1], "last")])
"""


@pytest.mark.slow
def test_curation_continues_after_kill_with_identical_files(data, tmp_path, chat_folder):
    (tmp_path / "deadly_stage.py").write_text(DEADLY)
    stages = [*STAGES[:3], {"stage": "deadly"}, *STAGES[4:]]
    options = {"pool": [{"path": "pool.jsonl"}], "stages": stages, "root": str(data), "imports": ["deadly_stage"]}
    text = yaml.safe_dump(options).replace("TOKENIZER", str(chat_folder))
    (tmp_path / "recipe.yaml").write_text(text)

    def run(out):
        command = [sys.executable, "-m", "recurrent_depth.cli", "curate", "--config", "recipe.yaml", "--out", out]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ)).returncode

    assert run("killed") == -signal.SIGKILL
    assert not (tmp_path / "killed" / "manifest.json").exists()
    done = {place.name: place.stat().st_mtime_ns for place in (tmp_path / "killed" / "cache" / "stages").iterdir()}
    assert len(done) == 3
    assert run("killed") == 0
    assert run("whole") == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    for name, time in done.items():
        assert (tmp_path / "killed" / "cache" / "stages" / name).stat().st_mtime_ns == time


class TestCurateErrors:
    def test_curation_without_remaining_rows_reports_reasons(self, data, tmp_path, chat_folder):
        stages = [{"stage": "quality"}, {"stage": "lengths", "tokenizer": "TOKENIZER", "at_least": 999}]
        with pytest.raises(ValueError, match=r"lengths left no row of 18 \(trace too short: 18\).*dropped\.parquet"):
            curate(recipe(data, tmp_path / "out", chat_folder, stages))
        assert pq.read_table(tmp_path / "out" / "dropped.parquet").num_rows == 20
        assert not (tmp_path / "out" / "examples.parquet").exists()

    @pytest.mark.parametrize(
        ("description", "message"),
        [
            ({"stage": "filter"}, "'filter' is not a kind of stage; known are .*quality"),
            (
                {"stage": "quality", "filter": []},
                "unknown option stages.quality.filter; did you mean stages.quality.filters",
            ),
            ({"stage": "diverse"}, "stages.diverse.size is required"),
            ({"stage": "diverse", "size": "ten"}, "stages.diverse.size is 'ten'; it must be a whole number"),
            ({"stage": "diverse", "size": True}, "size is True; it must be a whole number"),
            ({"stage": "diverse", "size": 1, "domains": "all"}, "must be one of uniform, benchmark"),
            ({"stage": "diverse", "size": 1, "seeds": "AIME"}, "seeds is 'AIME'; it must be a list"),
            (
                {"stage": "diverse", "size": 1, "seeds": ["AIME"]},
                r"seeds\[0\] is 'AIME'; it must be a mapping with the fields source",
            ),
            (
                {"stage": "teacher", "writer": {"url": "u"}},
                "unknown option stages.teacher.writer.url; known are endpoint, local",
            ),
            ({"stage": "difficulty"}, "give at least one"),
            (
                {"stage": "difficulty", "models": [{"name": "a"}]},
                r"stages.difficulty.models\[0\].writer, recorded: the attempts of a need exactly one",
            ),
            ({"stage": "decontaminate"}, "against is empty"),
            (
                {"stage": "lengths", "tokenizer": "x", "at_least": 5, "at_most": 4},
                "at_most is 4; it must be at least 5",
            ),
        ],
    )
    def test_curation_refuses_invalid_recipe_before_reading_rows(self, tmp_path, description, message):
        config = CurateConfig(out=str(tmp_path / "out"), pool=[SourceConfig("nowhere.jsonl")], stages=[description])
        with pytest.raises(ValueError, match=message):
            curate(config)

    def test_curation_refuses_stage_that_loses_rows(self, data, tmp_path, chat_folder):
        @stage("forgetful")
        @dataclass(frozen=True)
        class Forgetful(Stage):
            def apply(self, examples, context):
                return Outcome(examples[1:])

        try:
            with pytest.raises(ValueError, match="stage forgetful must keep or drop every row"):
                curate(recipe(data, tmp_path / "out", chat_folder, [{"stage": "forgetful"}]))
        finally:
            del STAGES_KNOWN["forgetful"]

    @pytest.mark.parametrize(
        ("missing", "description", "message"),
        [
            (
                "sklearn",
                {"stage": "domains", "labeller": {"clusters": {}}},
                r"pip install 'recurrent-depth\[curate\]'",
            ),
            ("math_verify", {"stage": "grade_traces"}, r"math_verify.*pip install 'recurrent-depth\[curate\]'"),
            (
                "openai",
                {"stage": "teacher", "writer": {"endpoint": {"url": "http://u", "model": "m"}}},
                "package openai",
            ),
            ("transformers", {"stage": "teacher", "writer": {"local": {"model": "a/b"}}}, "package transformers"),
            ("transformers", {"stage": "lengths", "tokenizer": "a/b"}, "package transformers"),
            ("datasets", {"stage": "decontaminate", "against": [{"path": "a/b"}]}, "package datasets"),
            ("", {"stage": "decontaminate", "against": [{"path": "none.jsonl"}]}, r"none\.jsonl does not exist"),
            ("", {"stage": "teacher", "writer": {"local": {"model": "no/folder"}}}, "no such folder 'no/folder'"),
            ("", {"stage": "lengths", "tokenizer": "nothing.json"}, r"nothing\.json does not exist"),
            ("", {"stage": "difficulty", "models": [{"name": "a", "recorded": "none.jsonl"}]}, r"none\.jsonl does not"),
        ],
    )
    def test_curation_error_names_missing_file_model_or_package_before_stages_run(
        self, data, tmp_path, chat_folder, monkeypatch, missing, description, message
    ):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        if missing:
            monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises((UserError, OSError), match=message):
            curate(recipe(data, tmp_path / "new" / "out", chat_folder, [STAGES[0], description]))
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("content", [None, "import nothing_at_all", "1 / 0"])
    def test_curation_error_names_failing_import(self, data, tmp_path, chat_folder, monkeypatch, content):
        monkeypatch.chdir(tmp_path)
        name = f"own_stages_{content and len(content)}"
        if content:
            (tmp_path / f"{name}.py").write_text(content)
        with pytest.raises(DataError, match=f"imports: '{name}' cannot be imported"):
            curate(recipe(data, tmp_path / "out", chat_folder, imports=[name]))
        assert not (tmp_path / "out").exists()

    def test_curation_with_missing_pool_leaves_no_folder(self, tmp_path):
        config = CurateConfig(out=str(tmp_path / "new" / "out"), pool=[SourceConfig("nowhere.jsonl")])
        with pytest.raises(FileNotFoundError, match="nowhere"):
            curate(config)
        assert not (tmp_path / "new").exists()

    def test_curation_refuses_folder_in_use(self, data, tmp_path, chat_folder):
        (tmp_path / "out").mkdir()
        with folder_lock(tmp_path / "out"), pytest.raises(FolderInUseError, match="is in use by process"):
            curate(recipe(data, tmp_path / "out", chat_folder))

    def test_curation_refuses_damaged_cache(self, data, tmp_path, chat_folder):
        config = recipe(data, tmp_path / "out", chat_folder, STAGES[:2])
        curate(config)
        for file in ("kept.parquet", "dropped.parquet", "facts.json"):
            for place in (tmp_path / "out" / "cache" / "stages").iterdir():
                content = (place / file).read_bytes()
                (place / file).write_bytes(content[: len(content) // 2])
                with pytest.raises(DataError, match="is damaged"):
                    curate(config)
                (place / file).write_bytes(content)

    def test_curation_on_full_disk_leaves_no_partial_files(self, data, tmp_path, chat_folder, monkeypatch):
        def full(*_, **__):
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(pq, "write_table", full)
        with pytest.raises(OSError, match=r"No space left on device while writing .*out; free some space"):
            curate(recipe(data, tmp_path / "new" / "out", chat_folder, STAGES[:2]))
        assert not (tmp_path / "new" / "out" / "manifest.json").exists()
        assert not list((tmp_path / "new").rglob("*.tmp"))

    def test_curation_replaces_lone_surrogates(self, data, tmp_path, chat_folder):
        (data / "pool.jsonl").write_text('{"question": "a\\ud800?", "answer": "1", "trace": "x"}\n')
        curate(recipe(data, tmp_path / "out", chat_folder, [{"stage": "quality"}]))
        assert [row.question for row in read_examples(tmp_path / "out")] == ["a??"]

    def test_curation_refuses_two_stages_with_one_name(self):
        stages = [{"stage": "quality"}, {"stage": "quality"}]
        with pytest.raises(ValueError, match="stages: two are called 'quality'"):
            CurateConfig(out="x", pool=[SourceConfig("a")], stages=stages)
        CurateConfig(out="x", pool=[SourceConfig("a")], stages=[stages[0], {"stage": "quality", "name": "again"}])

    def test_curate_command_prints_error_without_traceback(self, tmp_path, capsys):
        (tmp_path / "r.yaml").write_text("pool: [{path: nowhere.jsonl}]\nstages: [{stage: quality}]\n")
        assert main(["curate", "--config", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert "nowhere.jsonl does not exist" in error
        assert "Traceback" not in error


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_curation_recipe_parses(path):
    config = parse_options(CurateConfig, ["--config", str(path), "--out", "x"])
    assert [build_stage(description) for description in config.stages]


def test_ablation_recipes_differ_only_in_selection():
    recipes = {path.stem: yaml.safe_load(path.read_text()) for path in RECIPES}
    assert {"s1", "gsm8k", "random", "diverse", "longest", "all"} <= set(recipes)
    names = {stem: [s["stage"] for s in recipe["stages"]] for stem, recipe in recipes.items()}
    for stem in ("random", "diverse", "longest", "all"):
        assert recipes[stem]["pool"] == recipes["gsm8k"]["pool"]
        assert "difficulty" not in names[stem]
    assert (names["random"][-1], names["longest"][-1], names["diverse"][-1]) == ("random", "longest", "diverse")


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.is_dir(), reason="../shared/data/gsm8k is absent")
def test_curation_drops_gsm8k_questions_that_overlap_test_set(tmp_path):
    config = CurateConfig(
        out=str(tmp_path / "out"),
        pool=[SourceConfig("train.jsonl", name="gsm8k", answer_format="gsm8k")],
        stages=[{"stage": "decontaminate", "against": [{"path": "test.jsonl"}]}, {"stage": "quality"}],
        root=str(GSM8K),
    )
    curate(config)
    test = " ".join(
        f"| {' '.join(json.loads(line)['question'].lower().split())} |" for line in (GSM8K / "test.jsonl").open()
    )
    dropped = pq.read_table(tmp_path / "out" / "dropped.parquet").to_pylist()
    kept = read_examples(tmp_path / "out")
    assert len(dropped) + len(kept) == 7473
    assert dropped
    assert all(f"{row['detail']} " in test for row in dropped if row["stage"] == "decontaminate")
    for row in kept[::50]:
        words = row.question.lower().split()
        assert not any(f" {' '.join(words[i : i + 8])} " in test for i in range(len(words) - 7))
