"""Folders that cannot be loaded: one message with cause and fix, from every verb that loads a model."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from recurrent_depth.cli import main
from recurrent_depth.data.tokenizer import train_tokenizer
from recurrent_depth.hf.chat import stop_ids
from recurrent_depth.hf.loading import ModelError, fast_tokenizer, load_model, wrap
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.transformer import RecurrentDepthModel
from support import error_line


@pytest.fixture
def folder(chat_folder, tmp_path):
    return shutil.copytree(chat_folder, tmp_path / "model")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def larger_vocabulary(folder):
    train_tokenizer(["many other words " * 30, "".join(map(chr, range(200, 900)))], 400).save(
        str(folder / "tokenizer.json")
    )


DAMAGE = {
    "config.json cut": (lambda f: cut(f / "config.json"), "config.json"),
    "config.json empty": (lambda f: (f / "config.json").write_text(""), "config"),
    "config.json a list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "config.json absent": (lambda f: (f / "config.json").unlink(), "neither config.json nor checkpoints"),
    "another architecture": (lambda f: edit_config(f, model_type="unheard_of"), "model_type 'unheard_of'"),
    "an impossible width": (lambda f: edit_config(f, n_embd=31), "n_embd"),
    "a width as text": (lambda f: edit_config(f, n_embd="wide"), "cannot be loaded"),
    "another width": (lambda f: edit_config(f, n_embd=64), "cannot be loaded"),
    "another vocabulary": (lambda f: edit_config(f, vocab_size=300), "cannot be loaded"),
    "more layers": (lambda f: edit_config(f, n_layers_in_coda=2), "lack transformer.coda.1"),
    "fewer layers": (lambda f: edit_config(f, n_layers_in_prelude=0), "n_layers_in_prelude"),
    "further weights": (lambda f: edit_weights(f, lambda t: t.update(x=torch.ones(1))), "beyond its config.json, x"),
    "a weight absent": (lambda f: edit_weights(f, lambda t: t.pop("transformer.ln_f.weight")), "lack transformer.ln_f"),
    "weights cut": (lambda f: cut(f / "model.safetensors"), "safetensors|buffer|Error"),
    "weights that are text": (lambda f: (f / "model.safetensors").write_text("weights"), "cannot be loaded"),
    "weights absent": (lambda f: (f / "model.safetensors").unlink(), "no weights as .safetensors: none"),
    "weights pickled": (pickled, "pytorch_model.bin, a pickle, which is never read"),
    "tokenizer.json cut": (lambda f: cut(f / "tokenizer.json"), "tokenizer .* cannot be loaded"),
    "tokenizer.json no tokenizer": (lambda f: (f / "tokenizer.json").write_text('{"a": 1}'), "tokenizer .* cannot"),
    "tokenizer_config.json no JSON": (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer .* cannot"),
    "a larger vocabulary": (larger_vocabulary, r"ids up to 399, but the model embeds 320"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folder_is_refused_with_its_cause(folder, case):
    damage, cause = DAMAGE[case]
    damage(folder)
    with pytest.raises(ModelError, match=cause) as error:
        load_model(folder)
    assert str(folder) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("verb", ["generate", "export", "serve"])
@pytest.mark.parametrize("case", ["config.json cut", "weights pickled", "tokenizer.json cut", "more layers"])
def test_verbs_report_a_damaged_folder_in_one_line(folder, tmp_path, capsys, verb, case):
    DAMAGE[case][0](folder)
    options = {"generate": [], "export": ["--out", str(tmp_path / "out")], "serve": ["--port", "0"]}
    assert main([verb, "--model", str(folder), *options[verb]]) != 0
    assert error_line(capsys).startswith("error: model")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["/no/such/folder", "./runs/none", "runs/text/none", "runs/none", "none", "a b"])
def test_missing_model_is_reported_at_once(name):
    start = time.monotonic()
    with pytest.raises((ModelError, FileNotFoundError), match=f"no such folder '{name}'"):
        load_model(name)
    assert time.monotonic() - start < 10  # the client of the hub would retry for over a minute


def test_file_in_place_of_a_folder_is_refused(folder):
    with pytest.raises(FileNotFoundError, match="a file; give the folder"):
        load_model(folder / "config.json")


@pytest.mark.parametrize("device", ["bogus", "cuda:99", "meta"])
def test_unknown_device_is_refused(chat_folder, device):
    with pytest.raises(ValueError, match="device"):
        load_model(chat_folder, device=device)


def test_loaded_chat_model_stops_at_the_end_of_a_turn(chat_folder):
    model, tokenizer = load_model(chat_folder)
    ids = tokenizer.convert_tokens_to_ids(["<|end_text|>", "<|end_turn|>"])
    assert model.generation_config.eos_token_id == sorted(ids)
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.model_max_length == 2048
    assert stop_ids(model, tokenizer) == tuple(sorted(ids))


def test_loaded_model_keeps_the_stop_ids_of_its_folder(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": 77, "pad_token_id": 5}')
    model, tokenizer = load_model(folder)
    assert 77 in model.generation_config.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|end_turn|>") in model.generation_config.eos_token_id


def test_tokenizer_of_another_library_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="not a tokenizer"):
        fast_tokenizer(tmp_path / "tokenizer.json")


def test_folder_without_a_bias_of_queries_and_keys_loads(tmp_path):
    model = RecurrentDepthModel(ModelConfig())
    model.initialise(seed=0)
    wrap(model).save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda t: [t.pop(name) for name in list(t) if "qk_bias" in name or "freqs" in name])
    loaded, tokenizer = load_model(tmp_path)
    assert tokenizer is None
    ids = torch.arange(4)[None]
    assert torch.equal(loaded(ids, num_steps=2).logits, model(ids, num_steps=2).logits)


def test_saved_tokenizer_and_model_of_a_run_agree(chat_folder):
    assert len(AutoTokenizer.from_pretrained(chat_folder)) <= load_model(chat_folder)[0].config.vocab_size
