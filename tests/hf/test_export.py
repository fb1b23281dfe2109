"""Exports: the format of released folders, code that needs no package of ours, and the way back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

from recurrent_depth.data.tokenizer import train_tokenizer
from recurrent_depth.hf.export import ExportConfig, export
from recurrent_depth.hf.loading import load_model
from recurrent_depth.runs import load_run_model
from recurrent_depth.training.launch import train
from support import losses, small_run

FIXTURE = Path(__file__).parents[1] / "fixtures" / "huginn_tiny"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(small_run(folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return export(ExportConfig(model=str(run), out=str(tmp_path_factory.mktemp("out") / "small")))


def tensors(folder):
    found = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        with safe_open(file, "pt") as f:
            found |= {name: (f.get_slice(name).get_shape(), f.get_slice(name).get_dtype()) for name in f.keys()}  # noqa: SIM118
    return found


def test_a_released_folder_survives_a_round_trip(tmp_path):
    out = export(ExportConfig(model=str(FIXTURE), out=str(tmp_path / "again")))
    assert tensors(out) == tensors(FIXTURE)
    before, after = load_file(FIXTURE / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    released, ours = (json.loads((folder / "config.json").read_text()) for folder in (FIXTURE, out))
    for name in ("transformers_version", "init_values"):
        released.pop(name)
    assert {name: ours.get(name) for name in released} == released
    assert ours["init_values"]["out_proj"] == pytest.approx(0.02041241452319315)


def test_an_export_loads_where_our_package_is_absent(run, exported, tmp_path):
    ids = torch.arange(1, 9)[None]
    expected = load_run_model(run)(ids, num_steps=3).logits
    script = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("recurrent_depth", "recurrent_depth_kernels"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(exported)!r}, trust_remote_code=True, num_steps=3)
ids = torch.arange(1, 9)[None]
with torch.no_grad():
    torch.save(model(ids).logits, {str(tmp_path / "logits.pt")!r})
print(model.generate(ids, max_new_tokens=4, do_sample=False).shape[1])
"""
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-I", "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("12")
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), expected.detach())


def test_sharded_bf16_export_and_its_model_card(run, tmp_path):
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"versions": {"torch": "9"}, "table": "| t | p | acc (%) | 50.0 |"}))
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
    card = (out / "README.md").read_text()
    for fact in ("mean 4", "50.0", "torch 9", "steps", "shell_game"):
        assert fact in card


def test_training_starts_from_an_export(exported, tmp_path):
    again = small_run(tmp_path / "again", init_from=str(exported), steps=3)
    fresh = small_run(tmp_path / "fresh", steps=3)
    train(again)
    train(fresh)
    assert losses(tmp_path / "again")[0] < losses(tmp_path / "fresh")[0] - 0.1


def test_nothing_is_overwritten(exported, run):
    with pytest.raises(ValueError, match="not empty"):
        export(ExportConfig(model=str(run), out=str(exported)))


def test_the_chat_template_is_huginns(tmp_path):
    from recurrent_depth.hf.loading import _fast_tokenizer

    train_tokenizer(["hello world " * 20], 320).save(str(tmp_path / "tokenizer.json"))
    tokenizer = _fast_tokenizer(tmp_path / "tokenizer.json")
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
