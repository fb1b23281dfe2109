"""Generation tasks of lm-eval with transformers, and with the decoding engine under budgets and exits."""

import json
import math
import re
from collections import Counter

import pytest
import yaml
from lm_eval.api.instance import Instance

from recurrent_depth.cli import main
from recurrent_depth.evaluation.command import evaluate
from recurrent_depth.evaluation.config import BudgetGrid, EvalConfig, LmEvalConfig, TaskGroup
from recurrent_depth.evaluation.lm_eval import RecurrentLM, check_tasks, read_report
from recurrent_depth.generation.config import EngineOptions, Thinking
from recurrent_depth.hf.engine import decoding
from recurrent_depth.hf.loading import load_model
from support import decode

CONTEXTS = ["the quick", "how many apples are there?", "7"]


@pytest.fixture(scope="module")
def lm(chat_folder):
    model, tokenizer = load_model(chat_folder)
    lm = RecurrentLM(pretrained=model.double(), backend="causal", tokenizer=tokenizer, batch_size=2)
    lm.num_steps, lm.spent = 3, Counter()
    return lm


def ask(lm, **options):
    options = {"until": [], "max_gen_toks": 24, "do_sample": False} | options
    requests = [Instance("generate_until", {}, (context, options), i) for i, context in enumerate(CONTEXTS)]
    return lm.generate_until(requests, disable_tqdm=True)


def test_answers_and_stop_texts_are_read_after_the_thinking_part(lm):
    thinking = {"at_most": 6, "at_least": 4, "rounds": 1, "wait": "e"}
    options = {f"thinking.{name}": value for name, value in thinking.items()}
    lm.spent = Counter()
    answers = ask(lm, **options)
    engine = EngineOptions(num_steps=3, thinking=Thinking(**thinking))
    expected = decoding(engine, lm.tokenizer, max_new_tokens=24, stop=(lm.eot_token_id,))
    end = expected.thinking.end[0]
    thoughts = []
    for context, answer in zip(CONTEXTS, answers, strict=True):
        tokens = decode(lm.model, [lm.tok_encode(context)], expected).tokens[0]
        thoughts.append(lm.tokenizer.decode(tokens[: tokens.index(end)]))
        assert tokens.index(end) <= 7
        assert answer == lm.tok_decode(tokens[tokens.index(end) + 1 :]).lstrip()
    assert lm.spent["tokens"] <= 24 * 3
    assert lm.spent["core_iterations"] > 3 * lm.spent["tokens"]
    stop = next(char for char in answers[0][2:] if char in thoughts[0] and char not in answers[0][:2])
    assert ask(lm, **options, until=[stop])[0] == answers[0].partition(stop)[0]


def test_gate_stops_tokens_of_lm_eval(gated_folder):
    model, tokenizer = load_model(gated_folder)
    lm = RecurrentLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=2)
    lm.num_steps, lm.spent = 6, Counter()
    ask(lm, exit="gate", exit_threshold=0.5)
    early, lm.spent = lm.spent["core_iterations"], Counter()
    ask(lm)
    assert not lm.spent
    ask(lm, exit="gate", exit_threshold=1.0)
    assert early < lm.spent["core_iterations"]


def test_generation_without_engine_options_equals_an_exit_that_never_fires(lm):
    plain = ask(lm)
    assert ask(lm, exit="state-change", exit_threshold=0.0) == plain
    lm.spent = Counter()
    ask(lm, exit="state-change", exit_threshold=9.0, min_steps=2)
    prompts = sum(len(lm.tok_encode(context)) for context in CONTEXTS)
    assert lm.spent["core_iterations"] == 2 * (lm.spent["tokens"] + prompts - len(CONTEXTS))


def test_answers_can_be_chosen_among_several_initial_states(lm):
    plain = ask(lm)
    assert ask(lm, **{"best_of.samples": 1}) == plain
    lm.spent = Counter()
    ask(lm, **{"best_of.samples": 4, "best_of.choose_by": "vote"})
    prompts = sum(len(lm.tok_encode(context)) for context in CONTEXTS)
    assert lm.spent["core_iterations"] == 3 * (lm.spent["tokens"] + 4 * (prompts - len(CONTEXTS)))


def test_engine_options_refuse_a_random_initial_state(lm):
    lm.state_seed = 1
    try:
        with pytest.raises(ValueError, match=r"leave lm_eval\.state_seeds out"):
            ask(lm, exit="kl")
    finally:
        lm.state_seed = None


def write_task(folder, **changes):
    """Write a task of three questions that generates text."""
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps({"q": f"how many {i}?", "a": "7"}) + "\n" for i in range(3)))
    task = {
        "task": "count", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}",
        "generation_kwargs": {"max_gen_toks": 16, "until": ["?"], "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (folder / "count.yaml").write_text(yaml.safe_dump(task | changes))
    return str(folder)


@pytest.mark.slow
def test_lm_eval_tasks_are_asked_under_every_budget(chat_folder, tmp_path, monkeypatch):
    """A comma in the wait text has no special meaning: the decoding engine gets the text unchanged."""
    seen = []
    monkeypatch.setattr(
        "recurrent_depth.evaluation.lm_eval.decoding",
        lambda options, *args, **changes: seen.append(options.thinking) or decoding(options, *args, **changes),
    )
    section = LmEvalConfig(
        include_path=write_task(tmp_path / "tasks"), batch_size=3,
        gen_kwargs={"max_gen_toks": 20, "thinking": {"wait": "Wait, let me check"}},
        apply_chat_template=True, budgets=BudgetGrid(thinking_tokens=[0, 8], waits=[0, 2]),
    )  # fmt: skip
    config = EvalConfig(
        model=str(chat_folder), out=str(tmp_path / "out"), tasks=["count"], num_steps=[1, 2], lm_eval=section
    )
    results = evaluate(config)
    assert {r.budget for r in results} == {f"tokens={n} waits={w}" for n in (0, 8) for w in (0, 2)}
    assert {(r.mode, r.seed) for r in results} == {("lm-eval", None)}
    assert {(thinking.wait, thinking.at_most, thinking.rounds) for thinking in seen} == {
        ("Wait, let me check", tokens, waits) for tokens in (0, 8) for waits in (0, 2)
    }
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["lm_eval"]
    spent = {entry["budget"]: entry["engine_spent"] for entry in settings}
    short, long = spent["tokens=0 waits=0"], spent["tokens=8 waits=2"]
    assert 0 < short["1"]["tokens"] <= 60
    assert 0 < long["1"]["tokens"] <= 60
    assert short["2"]["core_iterations"] > short["1"]["core_iterations"]
    assert long["2"]["flops"] > long["1"]["flops"]


@pytest.mark.parametrize(
    ("gen_kwargs", "message"),
    [
        ({"thinking": {"wait": 1}}, r"gen_kwargs\.thinking\.wait is 1; it must be text: put it in quotes"),
        ({"thinking.at_most": "many"}, r"gen_kwargs\.thinking\.at_most is 'many'; it must be a whole number"),
        ({"thinking": {"atmost": 2}}, r"unknown option lm_eval\.gen_kwargs\.thinking\.atmost; did you mean .*at_most"),
        ({"exit": "kl", "min_steps": 0}, r"gen_kwargs\.min_steps is 0"),
    ],
)
def test_generation_options_of_the_wrong_type_are_refused(gen_kwargs, message):
    with pytest.raises(ValueError, match=message):
        check_tasks([TaskGroup(tasks=["shell_game_lm"], gen_kwargs=gen_kwargs)], LmEvalConfig())


@pytest.fixture(scope="module")
def odd_tasks(tmp_path_factory):
    """One folder with all malformed tasks: lm-eval reads thousands of files for every new folder."""
    folder = tmp_path_factory.mktemp("odd") / "tasks"
    write_task(folder, task="choice", output_type="multiple_choice", doc_to_choice=["7", "8"], doc_to_target=0)
    (folder / "line.yaml").write_text("just one line\n")
    (folder / "list.yaml").write_text("- a\n- b\n")
    (folder / "bare.yaml").write_text("task: bare\n")
    (folder / "dataless.yaml").write_text(
        "task: dataless\ndataset_path: json\ndataset_kwargs: {data_files: {test: absent.json}}\n"
    )
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("line", "tasks: line not found; `lm-eval ls tasks` lists the tasks"),
        ("list", "tasks: list not found"),
        ("bare", "lm-eval cannot load bare .*; check its YAML and data with `lm-eval validate --tasks bare`"),
        ("dataless", "lm-eval cannot load dataless"),
    ],
)
def test_lm_eval_tasks_that_cannot_be_loaded_are_named(odd_tasks, name, message, tmp_path, capsys):
    command = ["eval", "--model", str(tmp_path), "--out", str(tmp_path / "out"), "--tasks", name]
    assert main([*command, "--lm-eval.include-path", odd_tasks]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_tasks_that_do_not_generate_have_no_thinking_budget(odd_tasks):
    section = LmEvalConfig(include_path=odd_tasks, budgets=BudgetGrid(thinking_tokens=[8]))
    with pytest.raises(ValueError, match=r"choice does not generate text \(multiple_choice\)"):
        check_tasks([TaskGroup(tasks=["choice"])], section)


def test_reports_of_lm_eval_keep_every_metric_and_count_the_documents_of_groups():
    report = {
        "results": {
            "wikitext": {"alias": "w", "word_perplexity,none": 23.5, "word_perplexity_stderr,none": "N/A"},
            "arc": {"acc,none": 0.25, "acc_stderr,none": 0.1, "acc_norm,none": 0.5, "acc_norm_stderr,none": math.nan},
            "mmlu": {"acc,none": 0.3, "acc_stderr,none": 0.2},
        },
        "n-samples": {
            "wikitext": {"effective": 62}, "arc": {"effective": 10}, "a": {"effective": 4}, "b": {"effective": 3},
        },
        "group_subtasks": {"mmlu": ["stem", "b"], "stem": ["a"]},
    }  # fmt: skip
    assert list(read_report(report)) == [
        ("arc", "acc", 0.25, 0.1, 10), ("arc", "acc_norm", 0.5, None, 10), ("mmlu", "acc", 0.3, 0.2, 7),
        ("wikitext", "word_perplexity", 23.5, None, 62),
    ]  # fmt: skip
