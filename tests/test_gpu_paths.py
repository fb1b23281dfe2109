"""Every public path on a pretended GPU: no tensor on the wrong device, and the results of the CPU."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoModelForCausalLM, StaticCache

import recurrent_depth.hf  # noqa: F401
from pretended_gpu import CUDA, PretendedGPU, device_of
from recurrent_depth.generation.captured import CapturedToken
from recurrent_depth.generation.config import Captured, EngineOptions, Refill, Speculation, Wavefront
from recurrent_depth.generation.engine import Decoder
from recurrent_depth.generation.exits import RULES, StateChange, exit_rule
from recurrent_depth.generation.forcing import ThinkingBudget
from recurrent_depth.generation.request import Decoding
from recurrent_depth.hf.engine import Engine
from recurrent_depth.hf.forcing import BudgetForcing
from recurrent_depth.hf.loading import wrap
from recurrent_depth.model.random import truncated_normal
from recurrent_depth.model.recurrence import random_state
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.training.config import RuntimeConfig
from recurrent_depth.training.health import validate
from recurrent_depth.training.optimizer import build_optimizer
from recurrent_depth.training.parallel import Ranks
from recurrent_depth.training.trainer import Trainer
from support import decode, lively_model, small_run

FIXTURE = Path(__file__).parent / "fixtures" / "huginn_tiny"
PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [3], [7, 1, 4]]


class Event:
    """A CUDA event of a GPU that has always finished."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


def rehearse_only(self: CapturedToken) -> None:
    """Run all regions as before a capture, and capture none."""
    state = self.state.clone()
    self.rehearse()
    self.state.copy_(state)
    self.uses_graphs = False


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(CapturedToken, "capture", rehearse_only)
    monkeypatch.setattr("recurrent_depth.model.attention.compiled_flex", lambda: flex_attention)
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    with PretendedGPU() as mode:
        yield mode


@pytest.fixture(scope="module")
def model():
    return lively_model(block_size=64)


@pytest.fixture(scope="module")
def hf_model():
    return AutoModelForCausalLM.from_pretrained(FIXTURE, dtype=torch.float64)


def on_gpu(model):
    """Return a copy of a model on the pretended GPU."""
    import copy

    return copy.deepcopy(model).to(CUDA)


def assert_all_on_gpu(output: Any) -> None:
    tensors = [value for value in vars(output).values() if isinstance(value, torch.Tensor)]
    assert tensors
    assert {device_of(tensor) for tensor in tensors} == {CUDA}


def test_pretended_gpu_reports_a_tensor_on_the_wrong_device(gpu):
    x = torch.ones(3, device="cuda")
    assert (x + 1).device == x[1:].device == CUDA
    assert torch.ones(3, device=x.device).is_cuda
    with pytest.raises(RuntimeError, match="add: expected all tensors on the same device"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        x[torch.arange(2)]
    with pytest.raises(RuntimeError, match="same device"):
        torch.stack([x[0], torch.tensor(1.0)])
    assert gpu.reads.total() == 0
    assert x.sum().item() == 3
    assert gpu.reads == {"item": 1}


def arguments(kind):
    """Return the arguments of a forward pass by its name."""
    ids = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    documents = torch.tensor([[0] * 3 + [1] * 5, [0] * 8])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [*range(8)]])
    return {"input_ids": ids} | {
        "plain": {},
        "labels": {"labels": ids},
        "targets": {"targets": ids},
        "chunked loss": {"targets": ids, "loss_chunk_size": 3},
        "padded": {"attention_mask": mask, "labels": ids},
        "documents": {"document_ids": documents, "position_ids": positions, "targets": ids},
        "initial state": {"input_states": torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1))},
        "states": {"return_states": True},
    }[kind]


KINDS = ["plain", "labels", "targets", "chunked loss", "padded", "documents", "initial state", "states"]


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_stay_on_the_gpu(gpu, model, kind):
    expected = model(**arguments(kind), num_steps=(1, 3))
    model = on_gpu(model)
    given = {
        name: value.to(CUDA) if isinstance(value, torch.Tensor) else value for name, value in arguments(kind).items()
    }
    actual = model(**given, num_steps=(1, 3))
    assert_all_on_gpu(actual)
    torch.testing.assert_close(actual.state.cpu(), expected.state)
    if actual.loss is not None:
        actual.loss.backward()
        assert model.transformer.adapter.weight.grad.is_cuda


@pytest.mark.parametrize("recompute", ["step", "block"])
def test_recomputation_stays_on_the_gpu(gpu, model, recompute):
    model = on_gpu(model)
    model.transformer.core_block.activation_checkpointing = recompute
    ids = torch.arange(8, device=CUDA)[None]
    model(ids, targets=ids, num_steps=(1, 2)).loss.backward()
    assert model.transformer.adapter.weight.grad.is_cuda


def test_random_state_is_made_on_the_gpu_of_its_rows(gpu, model):
    rows, positions = torch.arange(3, device=CUDA), torch.arange(4, device=CUDA)[None]
    assert random_state(model.config, rows, positions, seed=1, step=2).is_cuda
    expected = truncated_normal(torch.arange(3), torch.arange(4)[None], 32, seed=1)
    assert torch.equal(truncated_normal(rows, positions, 32, seed=1).cpu(), expected)


@pytest.mark.parametrize("optimizer", ["huginn", "adamw", "nadamw", "muon"])
def test_training_steps_and_validation_stay_on_the_gpu(gpu, tmp_path, optimizer):
    config = small_run(tmp_path / "run", steps=2)
    config = replace(config, optimizer=replace(config.optimizer, name=optimizer))
    expected = Trainer(config, Ranks(0, 1, torch.device("cpu")))
    actual = Trainer(replace(config, runtime=RuntimeConfig(dtype="float32", kernels="torch")), Ranks(0, 1, CUDA))
    assert {device_of(p) for p in actual.parameters} == {CUDA}
    for _ in range(2):
        assert actual.train_step()["loss"] == pytest.approx(expected.train_step()["loss"], rel=1e-5)
    metrics = [validate(t.model, t.validation_source, config.validation, 4, t.ranks) for t in (actual, expected)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-3)


OPTIONS = {
    "plain": Decoding(max_new_tokens=6, num_steps=5),
    "sampled": Decoding(max_new_tokens=6, num_steps=5, temperature=1.0, top_k=20, top_p=0.9, seed=4),
    "warm start": Decoding(max_new_tokens=6, num_steps=5, warm_start=True, exit=StateChange(0.3)),
    "depth per request": Decoding(max_new_tokens=6, num_steps=[2, 5, 3, 4]),
    "rule per request": Decoding(max_new_tokens=6, num_steps=6, exit=[None, StateChange(0.3), exit_rule("kl"), None]),
    "thinking": Decoding(max_new_tokens=8, num_steps=3, thinking=ThinkingBudget((1,), (2,), (4,), at_most=3)),
    "prompt at full depth": Decoding(max_new_tokens=6, num_steps=6, exit=StateChange(0.3), exit_prompt=False),
} | {
    f"exit {name}, budget {budget}": Decoding(
        max_new_tokens=6, num_steps=8, min_steps=2, exit=exit_rule(name, threshold), cache_budget=budget
    )
    for name, threshold in {"state-change": 0.3, "kl": 0.1, "entropy": 0.01, "argmax": 3}.items()
    for budget in (None, 3, 1)
}  # fmt: skip


def assert_decoded_as_on_cpu(model, options, mode=None):
    expected, actual = decode(model, PROMPTS, options, mode), decode(on_gpu(model), PROMPTS, options, mode)
    assert actual.tokens == expected.tokens
    assert actual.steps == expected.steps


@pytest.mark.parametrize("mode", [None, Refill(2)], ids=["lockstep", "refilled"])
@pytest.mark.parametrize("name", OPTIONS)
def test_decoding_stays_on_the_gpu(gpu, model, name, mode):
    assert_decoded_as_on_cpu(model, OPTIONS[name], mode)


@pytest.mark.parametrize("name", [name for name in OPTIONS if "per request" not in name])
def test_captured_decoding_stays_on_the_gpu(gpu, model, name):
    assert_decoded_as_on_cpu(model, OPTIONS[name], Captured())


@pytest.mark.parametrize("name", ["plain", "sampled"])
@pytest.mark.parametrize(
    "mode", [Speculation(2, 3), Wavefront(2, 3), Wavefront(2, 3, exact=False, threshold=0.5)],
    ids=["speculation", "exact wavefront", "approximate wavefront"],
)  # fmt: skip
def test_modes_with_drafts_stay_on_the_gpu(gpu, model, mode, name):
    assert_decoded_as_on_cpu(model, OPTIONS[name], mode)


@pytest.mark.parametrize("budget", [None, 2])
def test_logits_of_a_decoder_stay_on_the_gpu(gpu, model, budget):
    ids = torch.tensor([[5, 6, 7], [1, 2, 3]])
    actual = Decoder(on_gpu(model)).logits(ids.to(CUDA), 4, budget)
    assert actual.is_cuda
    torch.testing.assert_close(actual.cpu(), Decoder(model).logits(ids, 4, budget))


def padded(device):
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 3]], device=device)
    return {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]], device=device)}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "options",
    [{}, {"state_seed": 3}, {"output_hidden_states": True}, {"use_cache": True}, {"logits_to_keep": 1}],
    ids=lambda options: ",".join(options) or "plain",
)
def test_transformers_forward_stays_on_the_gpu(gpu, hf_model, options, implementation):
    model = on_gpu(hf_model)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        actual, expected = model(**padded(CUDA), **options), hf_model(**padded("cpu"), **options)
    assert actual.logits.is_cuda
    torch.testing.assert_close(actual.logits.cpu(), expected.logits)
    assert model.decode_state(actual.last_state, padded(CUDA)["attention_mask"]).is_cuda


def test_transformers_training_stays_on_the_gpu(gpu, hf_model):
    model = on_gpu(hf_model).train()
    ids = padded(CUDA)["input_ids"]
    model(ids, labels=ids).loss.backward()
    assert model.transformer.adapter.weight.grad.is_cuda
    model.eval()


@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 2}, {"do_sample": True, "top_k": 5}],
    ids=lambda options: ",".join(options) or "greedy",
)
def test_transformers_generation_stays_on_the_gpu(gpu, hf_model, options):
    common = {"max_new_tokens": 5, "num_steps": 3, "do_sample": False, "disable_compile": True}
    results = []
    for model, device in ((on_gpu(hf_model), CUDA), (hf_model, "cpu")):
        torch.manual_seed(0)
        results.append(model.generate(**padded(device), **(common | options)))
    assert results[0].is_cuda
    assert torch.equal(results[0].cpu(), results[1])


def test_transformers_forward_with_a_static_cache_stays_on_the_gpu(gpu, hf_model):
    model = on_gpu(hf_model)
    cache = StaticCache(config=model.config, max_cache_len=6)
    ids = padded(CUDA)["input_ids"]
    with torch.no_grad():
        model(ids, past_key_values=cache)
        last = model(ids[:, :1], past_key_values=cache)
    assert last.logits.is_cuda


def test_engine_inside_generate_stays_on_the_gpu(gpu, hf_model):
    options = {"max_new_tokens": 4, "do_sample": False, "num_steps": 3, "use_cache": False}
    model = on_gpu(hf_model)
    actual = model.generate(**padded(CUDA), custom_generate=Engine(EngineOptions()), **options)
    assert actual.is_cuda
    assert torch.equal(actual.cpu(), hf_model.generate(**padded("cpu"), **options))


def test_budget_forcing_inside_generate_stays_on_the_gpu(gpu, hf_model):
    budget = ThinkingBudget((1,), (2,), (4,), at_most=2)
    model, batch = on_gpu(hf_model), padded(CUDA)
    forcing = BudgetForcing(budget, attention_mask=batch["attention_mask"])
    written = model.generate(**batch, logits_processor=[forcing], max_new_tokens=4, do_sample=False, num_steps=2)
    assert written.is_cuda
    assert written[0, 4].item() == 1


def test_wrapped_training_model_stays_on_the_gpu(gpu, model):
    wrapped = wrap(on_gpu(model)).to(CUDA)
    assert wrapped.device == CUDA
    assert wrapped(torch.arange(4, device=CUDA)[None]).logits.is_cuda
