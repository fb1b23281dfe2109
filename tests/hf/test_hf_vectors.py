"""The transformers class, loaded from a folder, against the reference vectors."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from recurrent_depth.hf import RecurrentDepthConfig

FIXTURE = Path(__file__).parents[1] / "fixtures" / "huginn_tiny"


@pytest.fixture(scope="module")
def expected():
    return load_file(FIXTURE / "expected.safetensors")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FIXTURE)


def close(actual, reference):
    torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-5 * reference.abs().max().item())


@pytest.mark.parametrize("r", [1, 2, 5])
def test_logits_and_greedy_tokens_equal_the_reference(model, expected, r):
    ids = expected["input_ids"]
    output = model(ids, num_steps=r, input_states=expected["input_states"])
    close(output.logits, expected[f"logits_s{r}"])
    close(output.latent_states, expected[f"states_s{r}"])
    pieces = [model(ids[:, :12], num_steps=r, use_cache=True)]
    for t in range(12, 16):
        pieces.append(model(ids[:, t : t + 1], num_steps=r, past_key_values=pieces[-1].past_key_values))
    close(torch.cat([piece.logits for piece in pieces], dim=1), expected[f"cached_logits_s{r}"])
    written = model.generate(ids[:1], num_steps=r, max_new_tokens=16, do_sample=False)
    assert torch.equal(written, expected[f"greedy_s{r}"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padded_batch_equals_single_rows(attention):
    model = AutoModelForCausalLM.from_pretrained(FIXTURE, attn_implementation=attention, dtype=torch.float64)
    prompts = [[5, 6, 7, 8, 9], [11, 12], [3]]
    padded = torch.tensor([[0] * (5 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (5 - len(p)) + [1] * len(p) for p in prompts])
    together = model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False, num_steps=3)
    for row, prompt in enumerate(prompts):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, num_steps=3)
        assert together[row, 5:].tolist() == alone[0, len(prompt) :].tolist()


def test_num_steps_comes_from_the_call_or_the_configuration(model, expected):
    ids = expected["input_ids"]
    three = AutoModelForCausalLM.from_pretrained(FIXTURE, num_steps=3)
    assert torch.equal(three(ids).logits, model(ids, num_steps=3).logits)
    assert not torch.equal(three(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="at least 1"):
        model(ids, num_steps=-1)
    with pytest.raises(ValueError, match="num_steps is 0"):
        AutoModelForCausalLM.from_pretrained(FIXTURE, num_steps=0)(ids)


def test_folder_may_lack_derived_tensors_and_hold_released_fields(tmp_path, expected):
    reference = load_file(FIXTURE / "model.safetensors")
    without_bias = {name: t for name, t in reference.items() if "qk_bias" not in name}
    zero_bias = {name: torch.zeros_like(t) if "qk_bias" in name else t for name, t in reference.items()}
    both_keys = {**zero_bias, "lm_head.weight": zero_bias["transformer.wte.weight"].clone()}
    head_only = dict(both_keys)
    del head_only["transformer.wte.weight"]
    outputs = []
    for number, tensors in enumerate([without_bias, zero_bias, both_keys, head_only]):
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(FIXTURE / "config.json", folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        outputs.append(AutoModelForCausalLM.from_pretrained(folder)(expected["input_ids"], num_steps=2).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[2], outputs[1])
    assert torch.equal(outputs[3], outputs[1])


def test_bf16_rotary_table_keeps_its_rounded_values(tmp_path, expected):
    tensors = load_file(FIXTURE / "model.safetensors")
    tensors["freqs_cis"] = tensors["freqs_cis"].bfloat16()
    shutil.copy(FIXTURE / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(rounded.freqs_cis.float(), tensors["freqs_cis"].float())
    exact = AutoModelForCausalLM.from_pretrained(FIXTURE)
    ids = expected["input_ids"]
    assert not torch.equal(rounded(ids).logits, exact(ids).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.isfinite(half(ids).logits).all()


def test_config_of_another_architecture_is_refused(tmp_path):
    text = (FIXTURE / "config.json").read_text().replace('"injection_type": "linear"', '"injection_type": "add"')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="injection_type"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_norm_is_stored_under_its_released_name(tmp_path):
    """config.json of a Huginn model has no additional field; another norm is stored and loaded as norm_class_name."""
    config = RecurrentDepthConfig.from_pretrained(FIXTURE)
    assert "norm" not in json.loads(config.to_json_string())
    assert (config.norm, config.norm_class_name) == ("rms", "RMSNorm_llama")
    layer = RecurrentDepthConfig.from_model_config(replace(config.to_model_config(), norm="layer"))
    layer.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["norm_class_name"] == "LayerNorm"
    again = RecurrentDepthConfig.from_pretrained(tmp_path)
    assert again.to_model_config().norm == "layer"
    with pytest.raises(ValueError, match="norm_class_name: 'ScaleNorm'; implemented are RMSNorm_llama, LayerNorm"):
        RecurrentDepthConfig(norm_class_name="ScaleNorm")


def test_base_model_is_the_model_without_the_head(model, expected):
    """TRL's fused loss calls model.base_model and applies the head itself."""
    ids, mask = expected["input_ids"], torch.ones_like(expected["input_ids"])
    output = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, num_steps=2)
    torch.testing.assert_close(model.lm_head(output.last_hidden_state), model(ids, num_steps=2).logits)
