"""Questions under budgets: what is counted is what was written, and budgets are kept."""

import csv
import dataclasses
import json

import pytest
import torch
import yaml
from lm_eval.utils import simple_parse_args_string

from reasoning_rows import puzzles
from recurrent_depth.cli import main
from recurrent_depth.data.config import DataConfig, PuzzleDataConfig
from recurrent_depth.data.layout import DataError
from recurrent_depth.data.tasks.puzzles import WORDS, puzzle_tokenizer
from recurrent_depth.evaluation import EvalConfig, evaluate
from recurrent_depth.evaluation.budgets import Attempt, Attempts, Examiner, Question
from recurrent_depth.evaluation.controls import ControlsConfig, best_of, majority, run_controls
from recurrent_depth.evaluation.sweep import TaskGroup, _budgeted
from recurrent_depth.generation import decoding
from recurrent_depth.generation.decoding import Decoding, decode
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.reasoning.config import ThinkingFormat
from recurrent_depth.reasoning.format import SPARES, Formatter
from recurrent_depth.training.launch import train
from support import lively_model, small_run

COLUMNS = ["model", "split", "task", "difficulty", "mode", "metric", "num_steps", "value", "stderr", "n"]
END_THINK = WORDS.index("<|end_think|>")


def exact(questions, answers):
    return [question.answer == answer for question, answer in zip(questions, answers, strict=True)]


@pytest.fixture(scope="module")
def examiner():
    model = lively_model(vocab_size=128, block_size=48)
    questions = [Question(row["question"], row["answer"]) for row in puzzles(9)]
    return Examiner(model, Formatter(puzzle_tokenizer(), ThinkingFormat()), questions, exact, 3, batch_size=4)


def test_every_question_is_asked_as_if_alone_and_everything_is_counted(examiner):
    together = examiner.ask(3, at_most=7)
    core_steps = flops = 0
    for index, question in enumerate(examiner.questions):
        options = Decoding(
            max_new_tokens=7 + 1 + 2 + 3, num_steps=3, stop=(examiner.formatter.end_answer,),
            thinking=examiner.formatter.budget(7),
        )  # fmt: skip
        alone = decode(examiner.model, [examiner.formatter.prompt(question.text)], options)
        reply = together.replies[index]
        thinking, answer = examiner.formatter.read_reply(alone.tokens[0])
        assert (reply.thinking_tokens, reply.answer, reply.new_tokens) == (thinking, answer, len(alone.tokens[0]))
        assert thinking <= 7
        core_steps += alone.core_steps
        flops += alone.flops
    assert (together.core_steps, together.flops) == (core_steps, flops)
    cell = together.cell("think=7,waits=0", 3, 7)
    assert cell.flops == pytest.approx(flops / 9)
    assert cell.within_budget == 1.0


class Scripted(Examiner):
    """Replies that are written down instead of decoded."""

    def _decode(self, prompts, options):
        script = iter(self.model)
        return [next(script) for _ in prompts], 10, 100


def replies(*texts):
    tokenizer = puzzle_tokenizer()
    return [tokenizer.encode(text).ids for text in texts]


def test_answers_are_read_graded_and_averaged(examiner):
    script = replies(
        "<|begin_think|> swap01 cup1 <|end_think|> <|begin_answer|> cup1 <|end_answer|>",
        "<|begin_think|> <|end_think|> <|begin_answer|> cup2 <|end_answer|>",
        "<|begin_think|> swap01 cup1 swap12 cup2 <|end_think|> <|begin_answer|>",
    )
    asked = [Question("cup0 swap01", "cup1"), Question("cup0 swap01", "cup1"), Question("cup0 swap02", "cup2")]
    scripted = Scripted(script, examiner.formatter, asked, exact)
    cell = Attempts(scripted_replies(scripted), 10, 100).cell("x", 4, at_most=3)
    assert cell.accuracy == pytest.approx(1 / 3)
    assert cell.thinking_tokens == pytest.approx((2 + 0 + 4) / 3)
    assert cell.new_tokens == pytest.approx((7 + 5 + 7) / 3)
    assert cell.within_budget == pytest.approx(2 / 3)
    assert cell.flops == pytest.approx(100 / 3)


def scripted_replies(scripted):
    read = [scripted.formatter.read_reply(ids) for ids in scripted.model]
    verdicts = scripted.grade(scripted.questions, [answer for _, answer in read])
    return [Attempt(t, len(ids), a, v) for (t, a), ids, v in zip(read, scripted.model, verdicts, strict=True)]


def test_waits_are_forced_within_the_budget(examiner, monkeypatch):
    """A model that wants to stop at once is made to go on exactly so often, one word "Wait" each."""
    monkeypatch.setattr(decoding, "draw", lambda logits, *_: torch.full((len(logits),), END_THINK))
    for waits, room, expected in ((0, 20, 0), (2, 20, 2), (4, 2, 2)):
        asked = examiner.ask(2, room, waits)
        assert {reply.thinking_tokens for reply in asked.replies} == {expected}


def attempt(answer, correct, tokens=2):
    return Attempt(tokens, tokens + 3, answer, correct)


def test_votes_and_the_oracle():
    samples = [
        Attempts([attempt("a", True), attempt("", False), attempt("c", False)], 1, 10),
        Attempts([attempt("b", False), attempt("d", True), attempt("c", False)], 2, 20),
        Attempts([attempt("b", False), attempt("", False), attempt("e", True)], 3, 30),
    ]
    voted, best = majority(samples), best_of(samples)
    assert [reply.answer for reply in voted.replies] == ["b", "d", "c"]
    assert [reply.correct for reply in voted.replies] == [False, True, False]
    assert [reply.correct for reply in best.replies] == [True, True, True]
    assert (voted.flops, best.core_steps, voted.replies[0].thinking_tokens) == (60, 6, 6)
    tie = majority(samples[:2])
    assert [reply.answer for reply in tie.replies] == ["a", "d", "c"]


class Lengths(Examiner):
    """Traces of given lengths: `model` maps a seed to the length of every question's trace, by its text."""

    def ask(self, num_steps, at_most, waits=0, *, forced=True, hint="", temperature=0.0, seed=0):
        lengths = [self.model(question.text, hint, seed) for question in self.questions]
        return Attempts([attempt("x", True, n) for n in lengths], len(lengths), 10 * len(lengths))


def test_rejection_pays_for_every_sample_and_gives_up(examiner):
    table = {"easy": [3, 3, 3], "later": [9, 9, 4], "never": [9, 9, 9]}
    asked = [Question(text, "x") for text in table]
    fake = Lengths(lambda text, hint, seed: table[text][seed], examiner.formatter, asked, exact)
    cells = run_controls(fake, ControlsConfig(rejection=[5], rejection_tries=3), 2, 0)
    (cell,) = cells
    assert cell.label == "rejection=5"
    assert cell.accuracy == cell.within_budget == pytest.approx(2 / 3)
    assert cell.flops == pytest.approx(10 * (3 + 2 + 2) / 3)


def test_told_budgets_are_measured_against_what_was_asked(examiner):
    told = {"": 50, "think 20 tokens": 10, "think 5 tokens": 10, "think 1 steps": 150, "little": 20, "much": 40}
    fake = Lengths(lambda text, hint, seed: told[hint], examiner.formatter, [Question("q", "x")], exact)
    config = ControlsConfig(
        token_conditional=[20, 5], step_conditional=[1], class_conditional=True, token_hint="think {n} tokens",
        step_hint="think {n} steps", short_hint="little", long_hint="much",
    )  # fmt: skip
    kept = {cell.label: cell.within_budget for cell in run_controls(fake, config, 2, 0)}
    assert kept == {
        "token-conditional=20": 1.0, "token-conditional=5": 0.0, "step-conditional=1": 0.0, "not asked": 1.0,
        "class-conditional=short": 1.0, "class-conditional=long": 0.0,
    }  # fmt: skip


def test_a_hint_reaches_the_model_and_an_unforced_trace_fits_the_block(examiner):
    plain = examiner.ask(2, 4, forced=False)
    hinted = examiner.ask(2, 4, forced=False, hint="cup5 cup5 cup5")
    assert [r.thinking_tokens for r in plain.replies] != [r.thinking_tokens for r in hinted.replies] or [
        r.answer for r in plain.replies
    ] != [r.answer for r in hinted.replies]
    longest = max(len(examiner.formatter.prompt(q.text)) for q in examiner.questions)
    assert max(r.new_tokens for r in plain.replies) + longest <= 48
    small = dataclasses.replace(examiner, model=lively_model(vocab_size=128, block_size=20))
    with pytest.raises(ValueError, match="no room to think"):
        small.ask(2, 4, forced=False)


def test_no_questions_and_no_samples_are_refused(examiner):
    with pytest.raises(DataError, match="no questions"):
        dataclasses.replace(examiner, questions=[])
    with pytest.raises(ValueError, match="temperature"):
        ControlsConfig(votes=[4], temperature=0.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    model = ModelConfig(n_embd=32, n_heads=2, intermediate_size=64, vocab_size=128, block_size=96, mean_recurrence=3)
    data = DataConfig(puzzles=PuzzleDataConfig(("swap",), 2, 4))
    return train(small_run(tmp_path_factory.mktemp("budget") / "run", model=model, data=data, steps=6))


@pytest.mark.slow
def test_the_command_writes_the_grid(run, tmp_path, capsys):
    rows = tmp_path / "questions.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in puzzles(5)))
    command = ["eval", "--model", str(run), "--out", str(tmp_path / "out"), "--questions.path", str(rows)]
    command += ["--num-steps", "1,2", "--thinking-tokens", "0,8", "--waits", "0,1", "--answer-tokens", "3"]
    assert main([*command, "--controls.votes", "[2]"]) == 0, capsys.readouterr().err
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        results = list(csv.DictReader(file))
    assert list(results[0]) == COLUMNS
    modes = {row["mode"] for row in results}
    assert {"think=0,waits=0", "think=8,waits=1", "majority=2", "best-of=2, oracle"} <= modes
    assert len(results) == 2 * (4 + 2)
    with (tmp_path / "out" / "grid.csv").open(newline="") as file:
        grid = {(row["label"], row["num_steps"]): row for row in csv.DictReader(file)}
    cheap, dear = grid["think=0,waits=0", "1"], grid["think=0,waits=0", "2"]
    assert float(cheap["thinking_tokens"]) == 0
    assert float(dear["flops"]) > float(cheap["flops"])
    for name in ("grid.png", "frontier.png"):
        assert (tmp_path / "out" / name).stat().st_size > 3000
    assert "Scaling along either axis" in (tmp_path / "out" / "grid.md").read_text()


def test_questions_without_budgets_are_refused(run, tmp_path, capsys):
    command = ["eval", "--model", str(run), "--out", str(tmp_path), "--questions.path", "x.jsonl"]
    assert main(command) == 2
    assert "--thinking-tokens" in capsys.readouterr().err


@pytest.mark.slow
def test_lm_eval_tasks_are_asked_under_every_budget(chat_folder, tmp_path):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "rows.jsonl").write_text("".join(json.dumps({"q": f"how many {i}?", "a": "7"}) + "\n" for i in range(3)))
    task = {
        "task": "count", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tasks / "rows.jsonl")}},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}",
        "generation_kwargs": {"max_gen_toks": 16, "until": ["?"], "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tasks / "count.yaml").write_text(yaml.safe_dump(task))
    config = EvalConfig(
        model=str(chat_folder), out=str(tmp_path / "out"), tasks=["count"], include_path=str(tasks), num_steps=[1, 2],
        thinking_tokens=[0, 8], waits=[0, 2], batch_size=3, gen_kwargs="max_gen_toks=20", apply_chat_template=True,
    )  # fmt: skip
    results = evaluate(config)
    assert {r.mode for r in results} == {f"lm-eval, think={n},waits={w}" for n in (0, 8) for w in (0, 2)}
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["lm_eval"]
    spent = {entry["mode"]: entry["engine_spent"] for entry in settings}
    short, long = spent["lm-eval, think=0,waits=0"], spent["lm-eval, think=8,waits=2"]
    assert 0 < short["1"]["tokens"] <= 60
    assert 0 < long["1"]["tokens"] <= 60
    assert short["2"]["core_steps"] > short["1"]["core_steps"]
    assert long["2"]["flops"] > long["1"]["flops"]


def test_a_budget_is_written_as_options_of_generation():
    config = EvalConfig("m", "o", ["t"], thinking_tokens=[0, 64], waits=[1], thinking_format=SPARES)
    groups = _budgeted(config, TaskGroup(["t"], gen_kwargs="max_gen_toks=99"))
    assert list(groups) == ["think=0,waits=1", "think=64,waits=1"]
    options = simple_parse_args_string(groups["think=64,waits=1"].gen_kwargs)
    assert options == {
        "max_gen_toks": 99, "think": True, "think_at_most": 64, "waits": 1, "wait": "Wait", "think_begin": "<|c_0|>",
        "think_end": "<|c_1|>",
    }  # fmt: skip
    assert _budgeted(EvalConfig("m", "o", ["t"]), TaskGroup(["t"])) == {"": TaskGroup(["t"])}
