"""Questions under thinking budgets: counts equal the written tokens, and budgets are kept."""

import csv
import dataclasses
import json

import pytest
import torch

from reasoning_rows import puzzles
from recurrent_depth.cli import main
from recurrent_depth.data.config import DataConfig, PuzzleDataConfig
from recurrent_depth.data.layout import DataError
from recurrent_depth.data.tasks.puzzles import WORDS, puzzle_tokenizer
from recurrent_depth.evaluation.budgets import Attempt, Attempts, Examiner, Question
from recurrent_depth.evaluation.config import ControlsConfig
from recurrent_depth.evaluation.controls import best_of, majority, run_controls
from recurrent_depth.evaluation.table import read_csv
from recurrent_depth.generation.request import Decoding
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.reasoning.config import ThinkingFormat
from recurrent_depth.reasoning.format import Formatter
from recurrent_depth.training.launch import train
from support import decode, lively_model, small_run

END_THINK = WORDS.index("<|end_think|>")


def exact(questions, answers):
    return [question.answer == answer for question, answer in zip(questions, answers, strict=True)]


@pytest.fixture(scope="module")
def examiner():
    model = lively_model(vocab_size=128, block_size=48)
    questions = [Question(row["question"], row["answer"]) for row in puzzles(9)]
    return Examiner(model, Formatter(puzzle_tokenizer(), ThinkingFormat()), questions, exact, 3, batch_size=4)


def test_questions_in_a_batch_give_the_replies_and_counts_of_each_alone(examiner):
    together = examiner.ask(3, at_most=7)
    core_iterations = flops = 0
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
        core_iterations += alone.core_iterations
        flops += alone.flops
    assert (together.core_iterations, together.flops) == (core_iterations, flops)
    cell = together.cell("budget-forcing", "tokens=7 waits=0", 3, 7)
    assert cell.flops == pytest.approx(flops / 9)
    assert cell.within_budget == 1.0


def test_cells_average_what_replies_say(examiner):
    questions = [Question("cup0 swap01", "cup1"), Question("cup0 swap01", "cup1"), Question("cup0 swap02", "cup2")]
    texts = [
        "<|begin_think|> swap01 cup1 <|end_think|> <|begin_answer|> cup1 <|end_answer|>",
        "<|begin_think|> <|end_think|> <|begin_answer|> cup2 <|end_answer|>",
        "<|begin_think|> swap01 cup1 swap12 cup2 <|end_think|> <|begin_answer|>",
    ]
    written = [puzzle_tokenizer().encode(text).ids for text in texts]
    read = [examiner.formatter.read_reply(ids) for ids in written]
    verdicts = exact(questions, [answer for _, answer in read])
    replies = [Attempt(t, len(ids), a, v) for (t, a), ids, v in zip(read, written, verdicts, strict=True)]
    cell = Attempts(replies, 10, 100).cell("budget-forcing", "x", 4, at_most=3)
    assert cell.accuracy == pytest.approx(1 / 3)
    assert cell.thinking_tokens == pytest.approx((2 + 0 + 4) / 3)
    assert cell.new_tokens == pytest.approx((7 + 5 + 7) / 3)
    assert cell.within_budget == pytest.approx(2 / 3)
    assert cell.flops == pytest.approx(100 / 3)


class AlwaysEndsThinking(torch.nn.Linear):
    """A head that always gives the end of thinking the largest logit."""

    def forward(self, x):
        logits = x.new_zeros(*x.shape[:-1], self.out_features)
        logits[..., END_THINK] = 1.0
        return logits


def test_examiner_forces_waits_within_the_budget(examiner):
    """The thinking of a model that always ends it at once is continued `waits` times, with one "Wait" each."""
    model = lively_model(vocab_size=128, block_size=48)
    model.lm_head = AlwaysEndsThinking(32, 128, bias=False, dtype=torch.float64)
    impatient = dataclasses.replace(examiner, model=model)
    for waits, room, expected in ((0, 20, 0), (2, 20, 2), (4, 2, 2)):
        asked = impatient.ask(2, room, waits)
        assert {reply.thinking_tokens for reply in asked.replies} == {expected}


def attempt(answer, correct, tokens=2):
    return Attempt(tokens, tokens + 3, answer, correct)


def test_majority_and_oracle_choose_among_samples():
    samples = [
        Attempts([attempt("a", True), attempt("", False), attempt("c", False)], 1, 10),
        Attempts([attempt("b", False), attempt("d", True), attempt("c", False)], 2, 20),
        Attempts([attempt("b", False), attempt("", False), attempt("e", True)], 3, 30),
    ]
    voted, best = majority(samples), best_of(samples)
    assert [reply.answer for reply in voted.replies] == ["b", "d", "c"]
    assert [reply.correct for reply in voted.replies] == [False, True, False]
    assert [reply.correct for reply in best.replies] == [True, True, True]
    assert (voted.flops, best.core_iterations, voted.replies[0].thinking_tokens) == (60, 6, 6)
    tie = majority(samples[:2])
    assert [reply.answer for reply in tie.replies] == ["a", "d", "c"]


class Lengths(Examiner):
    """An examiner with traces of given lengths: `model` maps a seed to the trace length of each question."""

    def ask(self, num_steps, at_most, waits=0, *, forced=True, hint="", temperature=0.0, seed=0):
        lengths = [self.model(question.text, hint, seed) for question in self.questions]
        return Attempts([attempt("x", True, n) for n in lengths], len(lengths), 10 * len(lengths))


def test_rejection_counts_every_sample_and_gives_up(examiner):
    table = {"easy": [3, 3, 3], "later": [9, 9, 4], "never": [9, 9, 9]}
    asked = [Question(text, "x") for text in table]
    fake = Lengths(lambda text, hint, seed: table[text][seed], examiner.formatter, asked, exact)
    cells = run_controls(fake, ControlsConfig(rejection=[5], rejection_tries=3), 2, 0)
    (cell,) = cells
    assert (cell.mode, cell.label) == ("rejection", "tokens=5")
    assert cell.accuracy == cell.within_budget == pytest.approx(2 / 3)
    assert cell.flops == pytest.approx(10 * (3 + 2 + 2) / 3)


def test_controls_compare_traces_with_the_hinted_budget(examiner):
    told = {"": 50, "think 20 tokens": 10, "think 5 tokens": 10, "think 1 steps": 150, "little": 20, "much": 40}
    fake = Lengths(lambda text, hint, seed: told[hint], examiner.formatter, [Question("q", "x")], exact)
    config = ControlsConfig(
        token_conditional=[20, 5], step_conditional=[1], class_conditional=True, token_hint="think {n} tokens",
        step_hint="think {n} steps", short_hint="little", long_hint="much",
    )  # fmt: skip
    kept = {(cell.mode, cell.label): cell.within_budget for cell in run_controls(fake, config, 2, 0)}
    assert kept == {
        ("token-conditional", "tokens=20"): 1.0, ("token-conditional", "tokens=5"): 0.0,
        ("step-conditional", "steps=1"): 0.0, ("class-conditional", "no hint"): 1.0,
        ("class-conditional", "short"): 1.0, ("class-conditional", "long"): 0.0,
    }  # fmt: skip


def test_hints_reach_the_model_and_unforced_traces_fit_the_block(examiner):
    plain = examiner.ask(2, 4, forced=False)
    hinted = examiner.ask(2, 4, forced=False, hint="cup5 cup5 cup5")
    assert [r.thinking_tokens for r in plain.replies] != [r.thinking_tokens for r in hinted.replies] or [
        r.answer for r in plain.replies
    ] != [r.answer for r in hinted.replies]
    longest = max(len(examiner.formatter.prompt(q.text)) for q in examiner.questions)
    assert max(r.new_tokens for r in plain.replies) + longest <= 48
    small = dataclasses.replace(examiner, model=lively_model(vocab_size=128, block_size=20))
    with pytest.raises(ValueError, match="do not fit the model's block of 20 tokens"):
        small.ask(2, 4, forced=False)


def test_budgets_beyond_the_block_are_refused_with_the_room_there_is(examiner):
    longest = max(len(examiner.formatter.prompt(q.text)) for q in examiner.questions)
    room = 48 - longest - (1 + 2 + 3)
    assert max(reply.thinking_tokens for reply in examiner.ask(1, room).replies) <= room
    with pytest.raises(ValueError, match=f"has room for {room} thinking tokens"):
        examiner.ask(1, room + 1)


def test_examiner_without_questions_is_refused(examiner):
    with pytest.raises(DataError, match="no questions"):
        dataclasses.replace(examiner, questions=[])


@pytest.fixture(scope="module")
def puzzle_run(tmp_path_factory):
    model = ModelConfig(n_embd=32, n_heads=2, intermediate_size=64, vocab_size=128, block_size=96, mean_recurrence=3)
    data = DataConfig(puzzles=PuzzleDataConfig(("swap",), 2, 4))
    return train(small_run(tmp_path_factory.mktemp("budget") / "run", model=model, data=data, steps=6))


@pytest.mark.slow
def test_eval_writes_the_grid_of_budgets(puzzle_run, tmp_path, capsys):
    rows = tmp_path / "questions.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in puzzles(5)))
    command = ["eval", "--model", str(puzzle_run), "--out", str(tmp_path / "out"), "--num-steps", "1,2"]
    command += [
        "--budgets.questions.path",
        str(rows),
        "--budgets.thinking-tokens",
        "[0, 8]",
        "--budgets.waits",
        "[0, 1]",
    ]
    assert main([*command, "--budgets.answer-tokens", "3", "--budgets.controls.votes", "[2]"]) == 0, (
        capsys.readouterr().err
    )
    results = read_csv(tmp_path / "out" / "results.csv")
    assert {(r.mode, r.budget) for r in results} == {
        *(("budget-forcing", f"tokens={tokens} waits={waits}") for tokens in (0, 8) for waits in (0, 1)),
        ("majority", "samples=2 tokens=8"), ("best-of-oracle", "samples=2 tokens=8"),
    }  # fmt: skip
    assert len(results) == 2 * (4 + 2)
    with (tmp_path / "out" / "grid.csv").open(newline="") as file:
        grid = {(row["mode"], row["label"], row["num_steps"]): row for row in csv.DictReader(file)}
    fewer, more = (grid["budget-forcing", "tokens=0 waits=0", r] for r in ("1", "2"))
    assert float(fewer["thinking_tokens"]) == 0
    assert float(more["flops"]) > float(fewer["flops"])
    assert ("majority", "samples=2 tokens=8", "1") in grid
    for name in ("grid.png", "frontier.png"):
        assert (tmp_path / "out" / name).stat().st_size > 3000
    assert "Along either axis" in (tmp_path / "out" / "grid.md").read_text()
