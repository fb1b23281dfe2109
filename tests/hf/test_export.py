"""Exports: the released format, code that runs without this package, and training from an export."""

import json
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig

from recurrent_depth.data.tokenizer import train_tokenizer
from recurrent_depth.depth_range import DepthRange, store, warn_beyond
from recurrent_depth.hf.export import export
from recurrent_depth.hf.loading import fast_tokenizer, load_model
from recurrent_depth.options import ExportConfig
from recurrent_depth.runs import load_run_model
from recurrent_depth.training.launch import train
from support import ANSWER, QUESTION, losses, run_without_our_package, small_run

FIXTURE = Path(__file__).parents[1] / "fixtures" / "huginn_tiny"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(small_run(folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return export(ExportConfig(model=str(run), out=str(tmp_path_factory.mktemp("out") / "small")))


@pytest.fixture(scope="module")
def chat_export(answering_folder, tmp_path_factory):
    return export(ExportConfig(model=str(answering_folder), out=str(tmp_path_factory.mktemp("out") / "answers")))


def tensors(folder):
    found = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        with safe_open(file, "pt") as f:
            found |= {name: (f.get_slice(name).get_shape(), f.get_slice(name).get_dtype()) for name in f.keys()}  # noqa: SIM118
    return found


def test_export_of_a_released_folder_keeps_its_config_and_weights(tmp_path):
    out = export(ExportConfig(model=str(FIXTURE), out=str(tmp_path / "again")))
    assert tensors(out) == tensors(FIXTURE)
    before, after = load_file(FIXTURE / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    released, ours = (json.loads((folder / "config.json").read_text()) for folder in (FIXTURE, out))
    for name in ("transformers_version", "init_values"):
        released.pop(name)
    assert {name: ours.get(name) for name in released} == released
    assert ours["init_values"]["out_proj"] == pytest.approx(0.02041241452319315)


class ReleasedConfig(PreTrainedConfig):
    """A config that passes tie_embeddings to its base class by name, as the released one does."""

    model_type = "huginn_raven"

    def __init__(self, n_embd: int = 8, tie_embeddings: bool = True, **kwargs: Any) -> None:
        self.n_embd, self.tie_embeddings = n_embd, tie_embeddings
        super().__init__(tie_word_embeddings=tie_embeddings, **kwargs)


def test_export_config_loads_in_the_released_config_class(exported, answering_folder):
    for folder in (exported, answering_folder):
        config = ReleasedConfig.from_pretrained(folder)
        assert config.n_embd == 32
        assert config.tie_word_embeddings


def test_export_loads_where_our_package_is_absent(run, exported, tmp_path):
    ids = torch.arange(1, 9)[None]
    expected = load_run_model(run)(ids, num_steps=3).logits
    out = run_without_our_package(
        f"""
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(exported)!r}, trust_remote_code=True, num_steps=3)
ids = torch.arange(1, 9)[None]
with torch.no_grad():
    torch.save(model(ids).logits, {str(tmp_path / "logits.pt")!r})
print(model.generate(ids, max_new_tokens=4, do_sample=False).shape[1])
model.save_pretrained({str(tmp_path / "again")!r})
again = AutoModelForCausalLM.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True, num_steps=3)
print(torch.equal(again(ids).logits, model(ids).logits))
""",
        tmp_path,
    )
    assert out.split() == ["12", "True"]
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), expected.detach())


def test_export_files_have_the_mode_of_new_files(exported):
    mask = os.umask(0)
    os.umask(mask)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in exported.iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~mask)
    assert stat.S_IMODE(exported.stat().st_mode) == 0o777 & ~mask


def test_export_names_the_tokens_that_end_a_text(chat_export):
    tokenizer = AutoTokenizer.from_pretrained(chat_export)
    config = GenerationConfig.from_pretrained(chat_export)
    ids = tokenizer.convert_tokens_to_ids
    assert set(config.eos_token_id) == {ids("<|end_turn|>"), ids("<|end_text|>")}
    assert config.pad_token_id == ids("<|pad|>")
    assert config.bos_token_id == ids("<|begin_text|>")
    assert tokenizer.model_max_length == 2048
    written = json.loads((chat_export / "generation_config.json").read_text())
    assert not written.get("_from_model_config")  # transformers 4 would derive it from config.json again


def test_model_card_runs_as_printed_and_the_model_ends_its_turn(chat_export, tmp_path):
    card = (chat_export / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1).replace('"DIR"', repr(str(chat_export)))
    chat = f"""
messages = [{{"role": "user", "content": {QUESTION!r}}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
ids = model.generate(**inputs, max_new_tokens=50, do_sample=False)
print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:]))
"""
    assert run_without_our_package(code + chat, tmp_path).strip() == ANSWER + "<|end_turn|>"


def test_sharded_bf16_export_and_its_model_card(run, tmp_path):
    results = tmp_path / "results.json"
    efforts = {"low": {"num_steps": 2}, "medium": {"num_steps": 4}, "high": {"num_steps": 4}}
    table = "| t | p | acc (%) | 50.0 |"
    results.write_text(json.dumps({"versions": {"torch": "9"}, "table": table, "reasoning_effort": efforts}))
    config = ExportConfig(str(run), str(tmp_path / "half"), "bfloat16", max_shard_size="50KB", results=str(results))
    out = export(config)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    kinds = {name: dtype for name, (_, dtype) in tensors(out).items()}
    assert kinds.pop("freqs_cis") == "F32"
    assert set(kinds.values()) == {"BF16"}
    loaded, _ = load_model(out, torch.bfloat16)
    ids = torch.arange(1, 9)[None]
    whole = load_run_model(run)(ids, num_steps=2).logits
    assert (loaded(ids, num_steps=2).logits - whole).abs().max() < 0.05 * whole.abs().max()
    assert GenerationConfig.from_pretrained(out).reasoning_effort == efforts
    card = (out / "README.md").read_text()
    for fact in ("mean 4", "acc (%) | 50.0", "torch 9", "training steps", "shell_game"):
        assert fact in card


def test_training_starts_from_an_export(exported, tmp_path):
    again = small_run(tmp_path / "again", init_from=str(exported), steps=3)
    fresh = small_run(tmp_path / "fresh", steps=3)
    train(again)
    train(fresh)
    assert losses(tmp_path / "again")[0] < losses(tmp_path / "fresh")[0] - 0.1


def test_export_warns_beyond_the_range_that_was_stored_with_its_model(tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(FIXTURE, model)
    store(model, DepthRange(2, 16, 8, 0.01, {2: 1.0, 8: 0.9, 16: 0.95, 32: 2.0}))
    export(ExportConfig(str(model), str(tmp_path / "out")))
    capsys.readouterr()
    warn_beyond(tmp_path / "out", 32)
    assert "outside of the range 2 to 16" in capsys.readouterr().err


def test_export_overwrites_nothing(exported, run):
    with pytest.raises(FileExistsError, match="not empty"):
        export(ExportConfig(model=str(run), out=str(exported)))


@pytest.mark.parametrize(
    ("text", "cause"),
    [("no json", "JSONDecodeError"), ("[1]", "TypeError"), ('{"results": [{"task": 1}], "versions": {}}', "KeyError")],
)
def test_export_refuses_foreign_results_and_leaves_nothing(run, tmp_path, text, cause):
    (tmp_path / "foreign.json").write_text(text)
    out = tmp_path / "new" / "export"
    with pytest.raises(ValueError, match=f"not a results.json of `recurrent-depth eval`.*{cause}"):
        export(ExportConfig(str(run), str(out), results=str(tmp_path / "foreign.json")))
    assert not out.parent.exists()


@pytest.mark.parametrize("change", [{"max_shard_size": "big"}, {"max_shard_size": "0GB"}, {"model": ""}])
def test_export_options_that_cannot_work_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        ExportConfig(**({"model": "m", "out": "o"} | change))


def test_chat_template_equals_huginns(tmp_path):
    train_tokenizer(["hello world " * 20], 320).save(str(tmp_path / "tokenizer.json"))
    tokenizer = fast_tokenizer(tmp_path / "tokenizer.json")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    messages = [{"role": "user", "content": " hello "}, {"role": "assistant", "content": "world"}]
    text = again.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|begin_text|><|begin_header|>user<|end_header|>\n\nhello<|end_turn|>"
        "<|begin_header|>Huginn<|end_header|>\n\nworld<|end_turn|>"
    )
    prompt = again.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
