"""`recurrent-depth generate` as a user calls it."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import recurrent_depth.hf  # noqa: F401
from recurrent_depth.cli import main


def run(capsys, folder, *options):
    assert main(["generate", "--model", str(folder), *options]) == 0
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


def test_it_writes_what_transformers_writes(chat_folder, capsys):
    prompts = ["the quick", "how many apples are there?"]
    rows, report = run(
        capsys, chat_folder, "--prompts", json.dumps(prompts), "--num-steps", "3", "--max-new-tokens", "8"
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chat_folder), AutoTokenizer.from_pretrained(chat_folder)
    for prompt, row in zip(prompts, rows, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, num_steps=3, max_new_tokens=8, do_sample=False)
        assert row["text"] == tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert row["steps"] == [3.0] * 8
    assert "16 tokens" in report
    assert "core steps" in report


def test_stop_texts_exits_and_thinking(chat_folder, capsys):
    options = ["--prompts", '["the quick"]', "--max-new-tokens", "24", "--num-steps", "4"]
    whole = run(capsys, chat_folder, *options)[0][0]["text"]
    stop = whole[5:8]
    cut = run(capsys, chat_folder, *options, "--stop", json.dumps([stop]))[0][0]["text"]
    assert cut == whole[: whole.find(stop)]
    drafted = run(capsys, chat_folder, *options, "--draft-steps", "2")[0][0]["text"]
    assert drafted == whole
    for mode in (["--wavefront-steps", "2"], ["--slots", "1"]):
        assert run(capsys, chat_folder, *options, *mode)[0][0]["text"] == whole
    streamed = run(capsys, chat_folder, *options, "--stream", "true")[1]
    assert whole in streamed
    early = run(capsys, chat_folder, *options, "--exit", "state-change", "--exit-threshold", "0.5")[0][0]
    assert min(early["steps"]) < 4
    assert run(capsys, chat_folder, *options, "--think", "true", "--think-at-most", "3", "--waits", "1")


def test_a_delimiter_of_two_tokens_is_refused(chat_folder, capsys):
    arguments = ["generate", "--model", str(chat_folder), "--prompts", '["a"]', "--think", "true"]
    assert main([*arguments, "--think-begin", "think now"]) == 1
    assert "must be one token" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        ("--num-steps", "0"),
        ("--exit-threshold", "-1"),
        ("--max-new-tokens", "5000"),
        ("--exit", "sudden"),
        ("--draft-steps", "2", "--slots", "4"),
        ("--slots", "0"),
        ("--wavefront-steps", "2", "--warm-start", "true"),
    ],
)
def test_bad_options_are_explained(chat_folder, capsys, option):
    assert main(["generate", "--model", str(chat_folder), "--prompts", '["a"]', "--exit", "kl", *option]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
