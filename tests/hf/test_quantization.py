"""Int8 weights: load_model, a torchao configuration in from_pretrained, and the command line."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from recurrent_depth.cli import main
from recurrent_depth.generation.config import Refill
from recurrent_depth.generation.engine import Decoder
from recurrent_depth.generation.request import Decoding
from recurrent_depth.hf.loading import load_model
from support import error_line

torchao = pytest.importorskip("torchao.quantization")
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(0))


def rounded(folder):
    """Return the model with every weight below the head rounded by hand to 255 values per output channel."""
    model, _ = load_model(folder)
    with torch.no_grad():
        for name, weight in model.transformer.named_parameters():
            if weight.ndim == 2 and "wte" not in name:
                scale = weight.abs().amax(1, keepdim=True) / 127.5
                weight.copy_((weight / scale).round().clamp(-128, 127) * scale)
    return model


def logits(model, ids, num_steps=4):
    with torch.no_grad():
        return model(ids, num_steps=num_steps).logits


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def from_pretrained(folder):
    from transformers import TorchAoConfig

    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=TorchAoConfig(torchao.Int8WeightOnlyConfig())
    )


def test_int8_model_equals_one_with_rounded_weights(chat_folder):
    plain, by_hand = load_model(chat_folder)[0], rounded(chat_folder)
    model, _ = load_model(chat_folder, quantize="int8")
    expected = logits(by_hand, IDS)
    # A few weights halfway between two values are rounded the other way.
    assert distance(logits(model, IDS), expected) < 0.2 * distance(logits(plain, IDS), expected)
    few = IDS[:1, :6]  # rows of the int8 kernel, whose inputs are rounded to bfloat16
    assert distance(logits(model, few), logits(by_hand, few)) < 0.02


def test_int8_quantises_the_adapter_and_not_the_head(chat_folder):
    model, _ = load_model(chat_folder, quantize="int8")
    assert model.lm_head.weight.dtype == torch.float32
    adapter = model.transformer.adapter.weight
    assert adapter.qdata.dtype == torch.int8
    assert adapter.qdata.shape == adapter.shape


@pytest.mark.parametrize("mode", [None, Refill(2)])
def test_decoder_of_an_int8_model_writes_what_full_passes_predict(chat_folder, mode):
    model, _ = load_model(chat_folder, quantize="int8")
    by_hand = rounded(chat_folder)
    prompts = [IDS[i, : 4 + i].tolist() for i in range(3)]
    found = Decoder(model, mode).generate(prompts, Decoding(max_new_tokens=4, num_steps=4))
    for prompt, tokens in zip(prompts, found.tokens, strict=True):
        predicted = logits(by_hand, torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
        written = predicted[torch.arange(4), torch.tensor(tokens)]
        assert (predicted.amax(-1) - written < 0.05 * predicted.std()).all()  # the best token, or nearly equal to it


def test_from_pretrained_quantises_by_a_torchao_configuration(chat_folder):
    model = from_pretrained(chat_folder)
    assert model.transformer.adapter.weight.qdata.dtype == torch.int8
    torch.testing.assert_close(logits(model, IDS), logits(load_model(chat_folder, quantize="int8")[0], IDS))
    assert model.generate(IDS, num_steps=2, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (3, 15)


def test_generate_takes_int8(chat_folder, capsys):
    options = ["--model", str(chat_folder), "--prompt", "the quick", "--max-new-tokens", "3", "--num-steps", "2"]
    assert main(["generate", *options, "--quantize", "int8"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == [2.0] * 3


def test_missing_torchao_is_named_before_the_model_is_read(chat_folder, capsys, monkeypatch):
    monkeypatch.setattr("recurrent_depth.extras.find_spec", lambda name: None)
    assert main(["generate", "--model", str(chat_folder), "--prompt", "a", "--quantize", "int8"]) != 0
    assert "pip install 'recurrent-depth[quantize]'" in error_line(capsys)
