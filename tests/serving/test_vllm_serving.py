"""`recurrent-depth serve --engine vllm`: what is special about it. The protocol's tests run with both engines."""

import json
import shutil

import pytest

from recurrent_depth.serving.config import Limits, ServeConfig
from recurrent_depth.serving.serve import chosen_engine
from servers import ask, running

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


def test_exit_budget_and_effort_give_the_texts_of_the_decoder(chat_folder, tmp_path):
    """The same options and requests to both engines: exits, a shared cache, thinking budgets, token ids."""
    shutil.copytree(chat_folder, tmp_path / "small")
    file = tmp_path / "small" / "generation_config.json"
    table = {"low": {"num_steps": 1}, "medium": {"num_steps": 3}, "high": {"num_steps": 6, "thinking_tokens": 5}}
    values = {"reasoning_effort": table} | json.loads(file.read_text())
    values.pop("_from_model_config", None)
    file.write_text(json.dumps(values))
    asked = [{"reasoning_effort": effort} for effort in table] + [{"num_steps": r} for r in (1, 2, 8)] + [{}]
    options = {
        "limits": Limits(num_steps=8, cache_gib=1), "exit": "state-change", "exit_threshold": 0.3, "cache_budget": 1,
        "default_num_steps": 5,
    }  # fmt: skip
    texts = {}
    for engine in ("transformers", "vllm"):
        with running(tmp_path / "small", engine=engine, **options) as (url, _):
            answers = [ask(url, prompt=[40, 50, 60], max_tokens=30, **fields) for fields in asked]
            texts[engine] = [answer["choices"][0]["text"] for _, answer in answers]
            card = ask(url, "/v1/models", method="GET")[1]["data"][0]
            assert (card["num_steps"], card["max_num_steps"]) == (5, 8)
            assert ask(url, num_steps=9)[0] == 400
    assert texts["vllm"] == texts["transformers"]
    assert len(set(texts["vllm"])) > 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int8"}, "quantize is int8, which only the engine transformers"),
        ({"kernels": "triton"}, "kernels is triton, which only the engine transformers"),
        ({"exit": "kl"}, "exit is kl, which only the engine transformers"),
    ],
)
def test_options_of_the_other_engine_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        chosen_engine(ServeConfig("m", engine="vllm", **options))
    assert chosen_engine(ServeConfig("m", **options)) == "transformers"
    assert chosen_engine(ServeConfig("m")) == "vllm"
