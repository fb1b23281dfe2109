"""Options of `eval` and `report`: what is refused, and what a section inherits."""

from pathlib import Path

import pytest
import yaml

from recurrent_depth.cli import main
from recurrent_depth.evaluation.config import EvalConfig, LmEvalConfig, TaskGroup
from recurrent_depth.parsing import parse_options

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "eval").glob("*.yaml"))
GENERATED = ["--generated.tasks", "[shell_game]"]
LM_EVAL = ["--tasks", "arc_easy"]
QUESTIONS = ["--budgets.questions.path", "q.jsonl"]
BUDGETS = [*QUESTIONS, "--budgets.thinking-tokens", "[8]"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate: give --tasks, --generated.tasks or --budgets.questions.path"),
        ([*LM_EVAL, "--out", ""], "out is ''"),
        ([*LM_EVAL, "--num-steps", "0"], "num_steps is [0]; every entry must be at least 1"),
        ([*LM_EVAL, "--num-steps", "[]"], "num_steps is empty"),
        ([*LM_EVAL, "--num-steps", "4,1000000"], "every entry must be at most 4096"),
        ([*LM_EVAL, "--lm-eval.batch-size", "0"], "lm_eval.batch_size is 0; it must be at least 1"),
        ([*LM_EVAL, "--lm-eval.limit", "0"], "lm_eval.limit is 0; it must be at least 1"),
        ([*LM_EVAL, "--lm-eval.length", "0"], "lm_eval.length is 0; it must be at least 1"),
        ([*LM_EVAL, "--lm-eval.num-fewshot", "-1"], "lm_eval.num_fewshot is -1; it must be at least 0"),
        ([*LM_EVAL, "--lm-eval.state-seeds", "[]"], "lm_eval.state_seeds is empty"),
        ([*LM_EVAL, "--lm-eval.groups", "[{tasks: []}]"], "a group has no tasks"),
        ([*LM_EVAL, "--lm-eval.budgets.thinking-tokens", "[-1]"], "budgets.thinking_tokens is [-1]"),
        ([*LM_EVAL, "--lm-eval.budgets.waits", "[2]"], "thinking_tokens is empty"),
        (
            [*LM_EVAL, "--lm-eval.budgets.thinking-tokens", "[8]", "--lm-eval.state-seeds", "[null,0]"],
            "thinking budgets start from zeros",
        ),
        ([*GENERATED, "--generated.rows", "0"], "generated.rows is 0; it must be at least 1"),
        ([*GENERATED, "--generated.length", "0"], "generated.length is 0; it must be at least 1"),
        ([*GENERATED, "--generated.batch-size", "-2"], "generated.batch_size is -2; it must be at least 1"),
        ([*GENERATED, "--generated.modes", "[]"], "generated.modes is empty"),
        ([*LM_EVAL, "--generated.rows", "8"], "generated has options but nothing to evaluate; give --generated.tasks"),
        ([*GENERATED, "--lm-eval.limit", "8"], "lm_eval has options but nothing to evaluate; give --tasks"),
        ([*GENERATED, "--budgets.waits", "[0]", "--budgets.answer-tokens", "3"], "give --budgets.questions.path"),
        (QUESTIONS, "budgets.thinking_tokens is empty"),
        ([*BUDGETS, "--budgets.waits", "[-1]"], "budgets.waits is [-1]"),
        ([*BUDGETS, "--budgets.answer-tokens", "0"], "budgets.answer_tokens is 0"),
        ([*BUDGETS, "--budgets.controls.votes", "[0]"], "budgets.controls.votes is [0]"),
        ([*BUDGETS, "--budgets.controls.temperature", ".nan"], "budgets.controls.temperature is "),
        ([*GENERATED, "--generated.tasks", "[chess]"], "known tasks are modular_arithmetic"),
        ([*GENERATED, "--device", "cuda:7"], "torch sees"),
        ([*GENERATED, "--device", "tpu"], "use auto, cpu, cuda or cuda:N"),
    ],
)
def test_eval_refuses_impossible_options(arguments, message, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert main(["eval", "--model", str(tmp_path), "--out", str(out), *arguments]) in (1, 2)  # 2: options
    assert message in capsys.readouterr().err
    assert not out.parent.exists()


def test_report_refuses_nothing_to_report(tmp_path, capsys):
    assert main(["report", "--out", str(tmp_path / "r.html")]) == 2
    assert "nothing to report: give --runs" in capsys.readouterr().err


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_protocols_parse(path):
    config = parse_options(EvalConfig, ["--config", str(path), "--model", "m", "--out", "o"])
    assert config.task_groups()


@pytest.mark.parametrize("wait", ["Wait, let me check", "1", "x=1,y=2", "true", "null"])
def test_wait_texts_are_read_as_they_are_written(wait, tmp_path):
    """A comma, a number or an equals sign in the text is not syntax."""
    file = tmp_path / "eval.yaml"
    file.write_text(yaml.safe_dump({"lm_eval": {"gen_kwargs": {"wait": wait, "temperature": 0.5, "max_gen_toks": 20}}}))
    config = parse_options(EvalConfig, ["--config", str(file), "--model", "m", "--out", "o", "--tasks", "t"])
    assert config.task_groups()[0].gen_kwargs == {"wait": wait, "temperature": 0.5, "max_gen_toks": 20}


def test_task_groups_inherit_generation_options_and_keep_their_own_prompts():
    section = LmEvalConfig(
        num_fewshot=2,
        gen_kwargs={"wait": "Wait, let me check", "max_gen_toks": 8},
        groups=[TaskGroup(tasks=["b"], apply_chat_template=True, gen_kwargs={"max_gen_toks": 64})],
    )
    first, second = EvalConfig(model="m", out="o", tasks=["a"], lm_eval=section).task_groups()
    assert (first.tasks, first.num_fewshot, first.apply_chat_template) == (["a"], 2, False)
    assert first.gen_kwargs == {"wait": "Wait, let me check", "max_gen_toks": 8}
    assert (second.tasks, second.num_fewshot, second.apply_chat_template) == (["b"], None, True)
    assert second.gen_kwargs == {"wait": "Wait, let me check", "max_gen_toks": 64}
