"""reasoning_effort: a table in the generation config gives num_steps and a thinking budget."""

import json
import shutil

import pytest

from recurrent_depth.evaluation.efforts import efforts_of_results, measured_efforts
from recurrent_depth.evaluation.table import Result
from servers import ask, running

TABLE = {"low": {"num_steps": 1}, "medium": {"num_steps": 2}, "high": {"num_steps": 4, "thinking_tokens": 3}}


@pytest.fixture(scope="module")
def folder(chat_folder, tmp_path_factory):
    """The chat model with a table."""
    copy = tmp_path_factory.mktemp("effort") / "small"
    shutil.copytree(chat_folder, copy)
    write_table(copy, TABLE)
    return copy


def write_table(folder, table):
    file = folder / "generation_config.json"
    values = json.loads(file.read_text()) | {"reasoning_effort": table}
    values.pop("_from_model_config", None)  # with it, transformers would derive the file from config.json again
    file.write_text(json.dumps(values))


def test_effort_sets_the_iterations(folder):
    with running(folder) as (url, _):
        for effort in ("low", "medium"):
            asked = ask(url, max_tokens=12, reasoning_effort=effort)[1]["choices"]
            assert asked == ask(url, max_tokens=12, num_steps=TABLE[effort]["num_steps"])[1]["choices"]
        assert asked != ask(url, max_tokens=12, reasoning_effort="low")[1]["choices"]
        both = ask(url, max_tokens=12, reasoning_effort="low", num_steps=2)[1]["choices"]
        assert both == asked  # num_steps has priority
        card = ask(url, "/v1/models", method="GET")[1]["data"][0]
        assert card["reasoning_effort"]["high"] == {"num_steps": 4, "thinking_tokens": 3}
        assert card["reasoning_effort"]["low"] == {"num_steps": 1, "thinking_tokens": None}
        assert ask(url, reasoning_effort="extreme")[0] == 400


def test_effort_opens_a_thinking_part_of_limited_length(folder):
    """The text is that of the same prompt with both delimiters around the first three tokens."""
    with running(folder) as (url, server):
        tokenizer = server.service.tokenizer
        begin, end = tokenizer.convert_tokens_to_ids(["<|begin_think|>", "<|end_think|>"])
        prompt = tokenizer("the quick")["input_ids"]
        whole = ask(url, prompt=prompt, max_tokens=10, reasoning_effort="high")[1]["choices"][0]["text"]
        thoughts = ask(url, prompt=[*prompt, begin], max_tokens=3, num_steps=4)[1]["choices"][0]["text"]
        thought_ids = tokenizer(thoughts)["input_ids"]
        opened = [*prompt, begin, *thought_ids, end]
        answer = ask(url, prompt=opened, max_tokens=5, num_steps=4)[1]["choices"][0]["text"]
        assert whole == thoughts + answer


def test_effort_without_a_table_is_a_400(server):
    status, answer = ask(server, reasoning_effort="low")
    assert (status, answer["error"]["param"]) == (400, "reasoning_effort")
    assert "no table" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"low": {"num_steps": 1}}, "it must have the entries low, medium, high"),
        ({name: {"num_steps": 0} for name in TABLE}, "num_steps is 0"),
        ({name: {"steps": 3} for name in TABLE}, "steps"),
        ({name: {"num_steps": 100} for name in TABLE}, "limits.num_steps is 64"),
    ],
)
def test_malformed_table_is_refused_at_start(chat_folder, tmp_path, table, message):
    shutil.copytree(chat_folder, tmp_path / "small")
    write_table(tmp_path / "small", table)
    with pytest.raises(ValueError, match=message), running(tmp_path / "small"):
        pass


def test_measured_efforts_are_the_fewest_iterations_that_reach_a_fraction_of_the_best():
    table = measured_efforts({1: 0.2, 2: 0.5, 4: 0.74, 8: 0.79, 16: 0.8, 32: 0.79})
    assert table == {"low": {"num_steps": 4}, "medium": {"num_steps": 8}, "high": {"num_steps": 16}}
    with pytest.raises(ValueError, match="empty"):
        measured_efforts({})


def result(metric, num_steps, value):
    return Result("m", "test", "t", "", "lm-eval", "", None, metric, num_steps, value, None, 10)


def test_efforts_of_results_average_the_accuracies_that_were_measured_at_every_depth():
    accuracies = {1: (0.2, 0.0), 4: (0.9, 0.5), 8: (0.8, 0.9)}  # the mean is 0.1, 0.7, 0.85
    results = [
        result(name, r, v) for r, pair in accuracies.items() for name, v in zip(("acc", "pass@1"), pair, strict=True)
    ]
    others = [result("perplexity", r, 50.0 - r) for r in accuracies] + [result("exact_match", 1, 1.0)]
    assert efforts_of_results(results + others) == measured_efforts({1: 0.1, 4: 0.7, 8: 0.85})
    assert efforts_of_results([result("acc", 4, 0.5)]) is None
