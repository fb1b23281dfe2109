"""`recurrent-depth generate` on the command line."""

import io
import json
import re
import sys

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import recurrent_depth.hf  # noqa: F401
from recurrent_depth.cli import main
from recurrent_depth.serving.generate import GenerateConfig


def run(capsys, folder, *options):
    assert main(["generate", "--model", str(folder), *options]) == 0
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


def test_generate_writes_what_transformers_writes(chat_folder, capsys):
    prompts = ["the quick", "how many apples are there?"]
    given = [part for prompt in prompts for part in ("--prompt", prompt)]
    rows, report = run(capsys, chat_folder, *given, "--num-steps", "3", "--max-new-tokens", "8")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chat_folder), AutoTokenizer.from_pretrained(chat_folder)
    for prompt, row in zip(prompts, rows, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, num_steps=3, max_new_tokens=8, do_sample=False)
        assert row["text"] == tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert row["steps"] == [3.0] * 8
    assert "16 tokens" in report
    assert "core iterations" in report


LITERAL = [
    "Once upon a time, there was",
    "42",
    "1e5",
    'Say "hi": now',
    "# heading",
    "[1, 2]",
    "{a: b}",
    "null",
    "true",
    "~",
    "it's",
    "a\nb",
    "- item",
    "&x *y !z",
    "--not an option",
]


def test_generate_takes_prompts_as_they_are(chat_folder, capsys):
    given = [f"--prompt={prompt}" for prompt in LITERAL]
    rows, _ = run(capsys, chat_folder, *given, "--max-new-tokens", "1", "--num-steps", "1")
    assert [row["prompt"] for row in rows] == LITERAL


def test_generate_reads_prompts_from_standard_input(chat_folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the quick, brown\n\n42\n"))
    rows, _ = run(capsys, chat_folder, "--max-new-tokens", "1", "--num-steps", "1")
    assert [row["prompt"] for row in rows] == ["the quick, brown", "42"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main(["generate", "--model", str(chat_folder)]) == 1
    assert "use --prompt TEXT" in capsys.readouterr().err


def test_generate_honours_stop_texts_modes_exits_and_thinking(chat_folder, capsys):
    options = ["--prompt", "the quick", "--max-new-tokens", "24", "--num-steps", "4"]
    whole = run(capsys, chat_folder, *options)[0][0]["text"]
    stop = whole[5:8]
    cut = run(capsys, chat_folder, *options, "--stop", stop)[0][0]["text"]
    assert cut == whole[: whole.find(stop)]
    modes = (["--speculation.steps", "2"], ["--wavefront.steps", "2"], ["--refill.lanes", "1"], ["--captured", "true"])
    for mode in modes:
        assert run(capsys, chat_folder, *options, *mode)[0][0]["text"] == whole
    streamed = run(capsys, chat_folder, *options, "--stream", "true")[1]
    assert whole in streamed
    exits = ["--exit", "state-change", "--exit-threshold", "0.5"]
    early = run(capsys, chat_folder, *options, *exits)[0][0]["steps"]
    assert early[0] < 4
    after_prompt = run(capsys, chat_folder, *options, *exits, "--exit-prompt", "false")[0][0]["steps"]
    assert after_prompt[0] == 4
    assert min(after_prompt) < 4
    assert run(capsys, chat_folder, *options, "--thinking.at_most", "3", "--thinking.rounds", "1")


def test_generate_takes_an_exit_rule_from_a_module_in_the_current_folder(chat_folder, capsys, tmp_path, monkeypatch):
    (tmp_path / "own_rules.py").write_text(
        "import torch\n"
        "class Second:\n"
        "    def remembers(self, vocab_size):\n"
        "        return 1\n"
        "    def converged(self, before, after, read, memory):\n"
        "        return memory[..., 0] == 1, torch.ones_like(memory)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    options = ["--prompt", "the quick", "--max-new-tokens", "3", "--num-steps", "6", "--exit", "own_rules:Second"]
    assert set(run(capsys, chat_folder.resolve(), *options)[0][0]["steps"]) == {2}


def test_generate_stops_tokens_by_the_gate_of_the_model(gated_folder, chat_folder, capsys):
    options = ["--prompt", "the quick", "--max-new-tokens", "24", "--num-steps", "8", "--exit", "gate"]
    early, late = (
        run(capsys, gated_folder, *options, "--exit-threshold", q)[0][0]["steps"] for q in ("0.5", "0.95")
    )  # fmt: skip
    assert len(set(early)) > 1
    assert all(one <= other for one, other in zip(early[:1], late[:1], strict=True))
    assert sum(early) < sum(late)
    assert main(["generate", "--model", str(chat_folder), *options]) == 1
    assert "the model has no exit gate; train one" in capsys.readouterr().err


def test_generate_chooses_among_answers_from_several_initial_states(chat_folder, capsys):
    options = ["--prompt", "the quick", "--prompt", "how many", "--max-new-tokens", "6", "--num-steps", "2"]
    plain, report = run(capsys, chat_folder, *options)
    assert run(capsys, chat_folder, *options, "--best-of.samples", "1")[0] == plain
    iterations = int(re.search(r"(\d+) core iterations", report)[1])
    for rule in ("likelihood", "convergence", "vote"):
        rows, report = run(capsys, chat_folder, *options, "--best-of.samples", "3", "--best-of.choose-by", rule)
        assert [row["prompt"] for row in rows] == ["the quick", "how many"]
        assert f"12 tokens, {3 * iterations} core iterations" in report


def refused(capsys, *options):
    """Return the error of a refused command; it is raised before the model is loaded."""
    assert main(["generate", "--model", "no-such-model", "--prompt", "a", *options]) != 0
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "no-such-model" not in err
    return " ".join(err.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-steps", "0"), "num_steps is 0; it must be at least 1 and at most 4096"),
        (("--num-steps", "1000000"), "num_steps is 1000000; it must be at least 1 and at most 4096"),
        (("--min-steps", "0"), "min_steps is 0"),
        (("--num-steps", "4", "--min-steps", "5"), "min_steps is 5; it must lie in [1, 4]"),
        (("--exit-threshold", "0.1"), "exit_threshold is given without exit; name the rule"),
        (("--exit", "kl", "--exit-threshold", "-1"), "exit_threshold is -1.0; it must be at least 0"),
        (("--exit", "kl", "--exit-threshold", ".nan"), "exit_threshold is '.nan'; it must be a number"),
        (("--exit", "kl", "--exit-threshold", ".inf"), "exit_threshold is inf"),
        (("--exit", "argmax", "--exit-threshold", "1"), "patience is 1; it must be at least 2"),
        (("--exit", "sudden"), "known rules are state-change"),
        (("--exit", "os:system"), "'os:system' is not an exit rule"),
        (("--exit", "builtins:dict"), "'builtins:dict' is not an exit rule"),
        (("--exit", "no.such.module:Rule"), "cannot be imported"),
        (("--exit", "math:nothing"), "cannot be imported"),
        (("--max-new-tokens", "0"), "max_new_tokens is 0; it must be at least 1"),
        (("--temperature", "-1"), "temperature is -1.0; it must be at least 0"),
        (("--temperature", ".nan"), "temperature is '.nan'; it must be a number"),
        (("--temperature", ".inf"), "temperature is inf"),
        (("--top-p", "0"), "top_p is 0.0; it must lie in (0, 1]"),
        (("--top-p", ".nan"), "top_p is '.nan'; it must be a number"),
        (("--top-p", "1.5"), "top_p is 1.5"),
        (("--top-k", "0"), "top_k is 0; it must be at least 1"),
        (("--cache-budget", "0"), "cache_budget is 0; it must be at least 1"),
        (("--speculation.steps", "0"), "steps is 0"),
        (("--speculation.tokens", "0"), "tokens is 0"),
        (("--wavefront.threshold", ".nan"), "wavefront.threshold is '.nan'; it must be a number"),
        (("--wavefront.average", "1"), "average is 1.0; it must lie in [0, 1)"),
        (("--wavefront.width", "0"), "width is 0"),
        (("--refill.lanes", "0"), "lanes is 0"),
        (("--speculation.steps", "2", "--refill.lanes", "4"), "speculation and refill each choose a mode"),
        (("--best-of.samples", "0"), "samples is 0; it must be at least 1"),
        (("--best-of.choose-by", "luck"), "it must be one of likelihood, convergence, vote"),
        (("--best-of.samples", "2", "--captured", "true"), "best_of is given together with captured"),
        (("--best-of.samples", "2", "--stream", "true"), "best_of chooses among several; leave one out"),
        (("--thinking.at_most", "-1"), "at_most is -1"),
        (("--thinking.at_most", "3", "--thinking.at_least", "4"), "at_least is 4; it must lie in [0, 3]"),
        (("--stop", ""), "stop is an empty text"),
        (("--device", "bogus"), "device is 'bogus'; use auto, cpu, cuda or cuda:N"),
        (("--dtype", "int8"), "dtype is 'int8'; it must be one of auto, float32, bfloat16"),
        (("--prompt", "b", "--stream", "true"), "stream needs one prompt, but 2 were given"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else "",
)
def test_generate_refuses_values_before_it_loads_the_model(capsys, options, message):
    assert message in refused(capsys, *options)


def test_generate_refuses_what_does_not_fit_the_model(chat_folder, capsys):
    for options, message in (
        (("--max-new-tokens", "5000"), "block_size 2048"),
        (("--wavefront.steps", "2", "--warm-start", "true"), "warm_start"),
        (("--thinking.begin", "think now"), "thinking.begin is 'think now', 8 tokens"),
        (("--speculation.steps", "9", "--num-steps", "4"), "fewer than num_steps"),
    ):
        assert main(["generate", "--model", str(chat_folder), "--prompt", "a", *options]) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ")
        assert message in line


def test_exit_rule_class_is_checked_before_it_is_called(capsys, monkeypatch):
    called = []
    monkeypatch.setattr("os.system", lambda *args: called.append(args))
    refused(capsys, "--exit", "os:system", "--exit-threshold", "0.5")
    refused(capsys, "--exit", "subprocess:Popen", "--exit-threshold", "0.5")
    assert called == []


def test_generate_options_name_the_field_of_wrong_numbers():
    with pytest.raises(ValueError, match="temperature is nan"):
        GenerateConfig(model="m", temperature=float("nan"))
