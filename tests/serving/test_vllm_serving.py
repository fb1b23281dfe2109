"""`recurrent-depth serve --engine vllm`: what is special about it. The protocol's tests run with both engines."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from recurrent_depth.model.config import ModelConfig
from recurrent_depth.serving.config import Limits, ServeConfig
from recurrent_depth.serving.serve import chosen_engine, load
from recurrent_depth.training.launch import train
from servers import ask, running
from support import small_run
from vllm_engines import write_model

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


def test_run_is_served_without_an_export(tmp_path):
    shape = ModelConfig(
        n_embd=32, n_heads=1, intermediate_size=64, vocab_size=64, block_size=32, mean_recurrence=4,
        mean_backprop_depth=2,
    )  # fmt: skip
    train(small_run(tmp_path / "run", model=shape))
    texts = []
    for engine in ("transformers", "vllm"):
        with running(tmp_path / "run", engine=engine, served_name="small", limits=Limits(cache_gib=1)) as (url, _):
            texts.append([ask(url, prompt=[3, 4, 5], max_tokens=20, num_steps=r)[1]["choices"] for r in (1, 4)])
    assert texts[0] == texts[1]


def test_depths_of_tokens_follow_the_requests_in_both_runners():
    """Three requests of 2, 1 and 3 tokens and one token of padding; the second one takes the default."""
    from vllm.v1.sample.logits_processor import BatchUpdate

    from recurrent_depth.serving.vllm.options import DepthOptions
    from recurrent_depth.serving.vllm.rows import RowDepths
    from recurrent_depth.serving.vllm.slots import DepthState

    depths, prompts = [5, 5, 4, 8, 8, 8, 1], [7, 7, 9, 2, 2, 2, 0]
    hf_config = SimpleNamespace(num_steps=8, default_num_steps=4, state_seed=None)
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config))
    params = [SimpleNamespace(extra_args=given) for given in ({"num_steps": 5}, None, {"num_steps": 8})]
    lengths = [7, 9, 2]

    rows = RowDepths(vllm_config, torch.device("cpu"), False)
    added = [(row, given, [0] * n, []) for row, (given, n) in enumerate(zip(params, lengths, strict=True))]
    rows.update_state(BatchUpdate(3, [], added, []))
    steps, prompt = rows.of_tokens(torch.tensor([0, 2, 3, 6]), 7)
    assert (steps.tolist(), prompt.tolist()) == (depths, prompts)

    state = object.__new__(DepthState)  # its base class needs a GPU
    state.rope_state = state.prompt_embeds_state = None
    state.device, state.options = torch.device("cpu"), DepthOptions.of(hf_config)
    state.depths = torch.zeros(9, 2, dtype=torch.long)
    slots = [6, 0, 3]
    for slot, given, n in zip(slots, params, lengths, strict=True):
        state.add_request(slot, SimpleNamespace(sampling_params=given, prompt_token_ids=[0] * n))
    batch = SimpleNamespace(
        idx_mapping_np=torch.tensor(slots).numpy(), num_scheduled_tokens=torch.tensor([2, 1, 3]).numpy(),
        num_tokens_after_padding=7,
    )  # fmt: skip
    found = state.prepare_inputs(batch, None)
    assert (found["num_steps"].tolist(), found["prompt_length"].tolist()) == (depths, prompts)


def test_model_that_vllm_cannot_serve_is_explained(tmp_path, chat_folder):
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    write_model(tmp_path / "small-heads", tokenizer, n_embd=32)
    with pytest.raises(ValueError, match=r"heads of size 16; on a CPU vLLM takes 32, .*--engine transformers"):
        load(ServeConfig(str(tmp_path / "small-heads"), engine="vllm", device="cpu"))
    options = {"engine": "vllm", "device": "cpu", "limits": Limits(num_steps=4), "cache_budget": 2}
    with pytest.raises(ValueError, match="cache_budget is 2 with num_steps 4"):
        load(ServeConfig(str(chat_folder), default_num_steps=2, **options))
