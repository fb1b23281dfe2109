"""Float8 products in the core: what is converted, that it trains, and what is refused. Emulated on the CPU."""

import dataclasses
import importlib.util

import pytest
import torch
from torch import nn

from recurrent_depth.cli import main
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.runs import load_run_model
from recurrent_depth.training import parallel
from recurrent_depth.training.config import RuntimeConfig, as_yaml
from recurrent_depth.training.float8 import convert_core, use_float8
from recurrent_depth.training.launch import train
from support import error_line, losses, run_ranks, small_run

pytest.importorskip("torchao")
CONFIG = ModelConfig(n_embd=64, n_heads=4, intermediate_size=96, vocab_size=64, n_layers_in_recurrent_block=2)
GPU = torch.device("cuda", 0)


def models():
    """Return a model with large weights, so that rounding shows, and its converted copy."""
    plain, converted = (RecurrentDepthModel(CONFIG) for _ in range(2))
    for model in (plain, converted):
        model.initialise(0)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.mul_(1.0 if "norm" in name or "ln_f" in name else 3.0)
    convert_core(converted, emulate=True)
    return plain, converted


def test_float8_converts_the_linear_layers_of_the_core_only():
    plain, converted = models()
    changed = {name for name, module in converted.named_modules() if isinstance(module, nn.Linear)} - {
        name for name, module in converted.named_modules() if type(module) is nn.Linear
    }
    layers = ("attn.Wqkv", "attn.proj", "mlp.fc", "mlp.proj")
    assert changed == {f"transformer.core_block.{block}.{layer}" for block in range(2) for layer in layers}
    assert type(converted.transformer.adapter) is nn.Linear
    for (name, p), (other, q) in zip(plain.named_parameters(), converted.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(p, q)


@pytest.mark.parametrize("layer", ["attn.Wqkv", "attn.proj", "mlp.fc", "mlp.proj"])
def test_float8_layer_multiplies_rounded_values(layer):
    """e4m3 has three bits after the leading one, so both factors are off by up to 1/16, in the mean by about 2.5%."""
    plain, converted = (model.transformer.core_block[0].get_submodule(layer) for model in models())
    rng = torch.Generator().manual_seed(0)
    scales = torch.tensor([1e-4, 1.0, 1e4])[:, None, None]  # a different scale per row
    x = (torch.randn(3, 32, plain.in_features, generator=rng) * scales).requires_grad_()
    y = x.detach().clone().requires_grad_()
    expected, actual = plain(x), converted(y)
    for out in (expected, actual):
        (out / scales).square().sum().backward()
    for a, b in [*zip(actual, expected, strict=True), (y.grad * scales, x.grad * scales)]:
        assert 0.01 < (a - b).norm() / b.norm() < 0.08


def test_float8_core_iterates_with_the_whole_adapter():
    """A hook makes the model call the adapter with [s; e]; without one it adds the half for e once per forward pass."""
    _, model = models()
    model.double()  # products are still rounded to float8; the rest is exact, so that both ways round equally
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    hoisted = model(ids, num_steps=3).logits
    calls = []
    model.transformer.adapter.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(ids, num_steps=3).logits, hoisted)
    assert len(calls) == 3


def emulated(config) -> None:
    """Train with emulated float8 products."""
    parallel.use_float8 = lambda model, device, dtype: convert_core(model, emulate=True)
    train(config)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_float8_run_trains_sharded_and_its_checkpoint_loads(tmp_path, world_size):
    runtime = RuntimeConfig(device="cpu", threads=1, dtype="bfloat16", activation_checkpointing="step")
    plain = small_run(tmp_path / "plain", runtime=runtime)
    config = small_run(tmp_path / "float8", runtime=dataclasses.replace(runtime, float8=True))
    assert run_ranks(train, world_size, plain) == [0] * world_size
    assert run_ranks(emulated, world_size, config) == [0] * world_size
    expected, found = losses(tmp_path / "plain"), losses(tmp_path / "float8")
    assert found != expected
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-2, atol=0)
    assert load_run_model(tmp_path / "float8")(torch.arange(8)[None]).logits.isfinite().all()


def refused(*arguments, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(as_yaml(small_run(tmp_path / "run")))
    assert main(["train", "--config", str(config), "--runtime.float8", "true", *arguments]) == 1
    assert not (tmp_path / "run" / "checkpoints").exists()
    return error_line(capsys)


def test_float8_is_refused_on_a_cpu(tmp_path, capsys):
    message = refused(tmp_path=tmp_path, capsys=capsys)
    assert message.startswith("error: runtime.float8 is true, but the device is cpu: float8 needs a GPU of compute")
    assert "set it to false" in message


def test_float8_is_refused_without_torchao(tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    absent = lambda module, *rest: None if module == "torchao" else find_spec(module, *rest)  # noqa: E731
    monkeypatch.setattr("recurrent_depth.extras.find_spec", absent)
    message = refused(tmp_path=tmp_path, capsys=capsys)
    assert message == "error: runtime.float8 needs the package torchao, which is missing; run pip install 'torchao'"


@pytest.mark.parametrize(
    ("hip", "found", "message"),
    [
        (None, (8, 0), "the GPU has compute capability 8.0"), (None, (8, 9), None), (None, (9, 0), None),
        ("7.0", "gfx90a", "the GPU is gfx90a"), ("7.0", "gfx942:sramecc+:xnack-", None), ("7.0", "gfx950", None),
    ],
)  # fmt: skip
def test_float8_needs_a_gpu_that_multiplies_in_it(monkeypatch, hip, found, message):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    properties = type("Properties", (), {"gcnArchName": found})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    model = RecurrentDepthModel(CONFIG)
    if message is None:
        use_float8(model, GPU, torch.bfloat16)
        assert type(model.transformer.core_block[0].mlp.fc) is not nn.Linear
    else:
        with pytest.raises(ValueError, match=message):
            use_float8(model, GPU, torch.bfloat16)


def test_float8_is_refused_in_float32_and_for_odd_widths(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ValueError, match=r"runtime\.dtype is torch\.float32; set it to bfloat16"):
        use_float8(RecurrentDepthModel(CONFIG), GPU, torch.float32)
    odd = RecurrentDepthModel(dataclasses.replace(CONFIG, intermediate_size=100))
    with pytest.raises(ValueError, match=r"model\.intermediate_size is 100; runtime\.float8 needs a multiple of 16"):
        use_float8(odd, GPU, torch.bfloat16)
