"""Every public path on a pretended GPU: no tensor on the wrong device, and the results of the CPU."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoModelForCausalLM, StaticCache

import recurrent_depth.hf  # noqa: F401
from pretended_gpu import CUDA, PretendedGPU, device_of
from recurrent_depth.analysis.recording import create
from recurrent_depth.analysis.texts import cut
from recurrent_depth.analysis.trajectories import converge, measure_jacobian, record, record_paths
from recurrent_depth.generation.captured import CapturedToken
from recurrent_depth.generation.config import Captured, EngineOptions, Refill, Speculation, Wavefront
from recurrent_depth.generation.engine import Decoder
from recurrent_depth.generation.exits import StateChange, exit_rule
from recurrent_depth.generation.forcing import ThinkingBudget
from recurrent_depth.generation.request import Decoding
from recurrent_depth.hf.engine import Engine
from recurrent_depth.hf.forcing import BudgetForcing
from recurrent_depth.hf.loading import wrap
from recurrent_depth.model.recurrence import random_state
from recurrent_depth.training.config import RuntimeConfig
from recurrent_depth.training.health import validate
from recurrent_depth.training.parallel import Ranks
from recurrent_depth.training.trainer import Trainer
from support import decode, lively_model, small_run

FIXTURE = Path(__file__).parent / "fixtures" / "huginn_tiny"
PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [3]]


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
    return PretendedGPU()


@pytest.fixture(scope="module")
def model():
    return lively_model(block_size=64)


@pytest.fixture(scope="module")
def hf_model():
    return AutoModelForCausalLM.from_pretrained(FIXTURE, dtype=torch.float64)


def on_gpu(model):
    """Return a copy of a model on the pretended GPU."""
    return copy.deepcopy(model).to(CUDA)


def assert_all_on_gpu(output: Any) -> None:
    tensors = [value for value in vars(output).values() if isinstance(value, torch.Tensor)]
    assert tensors
    assert {device_of(tensor) for tensor in tensors} == {CUDA}


def test_pretended_gpu_reports_a_tensor_on_the_wrong_device(gpu):
    with gpu:
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
    given = arguments(kind)
    expected = model(**given, num_steps=(1, 3))
    with gpu:
        model = on_gpu(model)
        given = {name: value.to(CUDA) if torch.is_tensor(value) else value for name, value in given.items()}
        gpu.reads.clear()
        actual = model(**given, num_steps=(1, 3))
        if actual.loss is not None:
            actual.loss.backward()
            assert model.transformer.adapter.weight.grad.is_cuda
        assert gpu.reads == ({"__bool__": 1} if kind == "padded" else {})  # whether there is padding at all
        assert_all_on_gpu(actual)
    torch.testing.assert_close(actual.state, expected.state)


@pytest.mark.parametrize("recompute", ["step", "block"])
def test_recomputation_stays_on_the_gpu(gpu, model, recompute):
    with gpu:
        model = on_gpu(model)
        model.transformer.core_block.activation_checkpointing = recompute
        ids = torch.arange(8, device=CUDA)[None]
        model(ids, targets=ids, num_steps=(1, 2)).loss.backward()
        assert model.transformer.adapter.weight.grad.is_cuda


def test_random_state_is_made_on_the_gpu_of_its_rows(gpu, model):
    expected = random_state(model.config, torch.arange(3), torch.arange(4)[None], seed=1, step=2)
    with gpu:
        rows, positions = torch.arange(3, device=CUDA), torch.arange(4, device=CUDA)[None]
        actual = random_state(model.config, rows, positions, seed=1, step=2)
        assert actual.is_cuda
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("optimizer", ["huginn", "adamw", "nadamw", "muon"])
def test_training_steps_and_validation_stay_on_the_gpu(gpu, tmp_path, optimizer):
    config = small_run(tmp_path / "run", steps=2)
    config = replace(config, optimizer=replace(config.optimizer, name=optimizer))
    on_cpu = Trainer(config, Ranks(0, 1, torch.device("cpu")))
    expected = [on_cpu.train_step()["loss"] for _ in range(2)]
    with gpu:
        trainer = Trainer(replace(config, runtime=RuntimeConfig(dtype="float32", kernels="torch")), Ranks(0, 1, CUDA))
        assert {device_of(p) for p in trainer.parameters} == {CUDA}
        gpu.reads.clear()
        assert [trainer.train_step()["loss"] for _ in range(2)] == pytest.approx(expected, rel=1e-4)
        assert gpu.reads == {"tolist": 2}  # one per training step
        metrics = validate(trainer.model, trainer.validation_source, config.validation, 4, trainer.ranks)
    assert metrics == pytest.approx(
        validate(on_cpu.model, on_cpu.validation_source, config.validation, 4, on_cpu.ranks), rel=1e-3
    )


RULES = {"state-change": (0.3, None), "kl": (0.1, 3), "entropy": (0.01, 1), "argmax": (3, None)}
"""Exit rule -> threshold and cache budget."""

OPTIONS = {
    "plain": Decoding(max_new_tokens=4, num_steps=5),
    "sampled": Decoding(max_new_tokens=4, num_steps=5, temperature=1.0, top_k=20, top_p=0.9, seed=4),
    "warm start": Decoding(max_new_tokens=4, num_steps=5, warm_start=True, exit=StateChange(0.3)),
    "depth per request": Decoding(max_new_tokens=4, num_steps=[2, 5, 3]),
    "rule per request": Decoding(max_new_tokens=4, num_steps=6, exit=[None, StateChange(0.3), exit_rule("kl")]),
    "thinking": Decoding(max_new_tokens=5, num_steps=3, thinking=ThinkingBudget((1,), (2,), (4,), at_most=2)),
    "prompt at full depth": Decoding(max_new_tokens=4, num_steps=6, exit=StateChange(0.3), exit_prompt=False),
} | {
    f"exit {name}": Decoding(
        max_new_tokens=4, num_steps=6, min_steps=2, exit=exit_rule(name, threshold), cache_budget=budget
    )
    for name, (threshold, budget) in RULES.items()
}  # fmt: skip


def assert_decoded_as_on_cpu(gpu, model, options, mode=None):
    """Decode on both devices; return the number of host reads on the GPU."""
    expected = decode(model, PROMPTS, options, mode)
    with gpu:
        model = on_gpu(model)
        gpu.reads.clear()
        actual = decode(model, PROMPTS, options, mode)
    assert actual.tokens == expected.tokens
    assert actual.steps == expected.steps
    return gpu.reads.total(), actual


@pytest.mark.parametrize("mode", [None, Refill(2)], ids=["lockstep", "refilled"])
@pytest.mark.parametrize("name", OPTIONS)
def test_decoding_stays_on_the_gpu(gpu, model, name, mode):
    assert_decoded_as_on_cpu(gpu, model, OPTIONS[name], mode)


@pytest.mark.parametrize("name", [name for name in OPTIONS if "per request" not in name])
def test_captured_decoding_stays_on_the_gpu(gpu, model, name):
    assert_decoded_as_on_cpu(gpu, model, OPTIONS[name], Captured())


def test_decoding_reads_on_the_host_once_per_token_and_once_per_checked_iteration(gpu, model):
    """Each read waits for the GPU."""
    tokens = 4
    assert assert_decoded_as_on_cpu(gpu, model, OPTIONS["plain"])[0] == tokens
    reads, result = assert_decoded_as_on_cpu(gpu, model, OPTIONS["exit state-change"])
    deepest = sum(max(steps) for steps in list(zip(*result.steps, strict=True))[1:])
    assert reads <= tokens + 6 + deepest  # 6 iterations of the prompt at most
    captured, _ = assert_decoded_as_on_cpu(gpu, model, OPTIONS["plain"], Captured())
    assert captured == tokens + (tokens - 1)  # new tokens, and their numbers of iterations


@pytest.mark.parametrize("name", ["plain", "sampled"])
@pytest.mark.parametrize(
    "mode", [Speculation(2, 3), Wavefront(2, 3), Wavefront(2, 3, exact=False, threshold=0.5)],
    ids=["speculation", "exact wavefront", "approximate wavefront"],
)  # fmt: skip
def test_modes_with_drafts_stay_on_the_gpu(gpu, model, mode, name):
    assert_decoded_as_on_cpu(gpu, model, OPTIONS[name], mode)


@pytest.mark.parametrize("budget", [None, 2])
def test_logits_of_a_decoder_stay_on_the_gpu(gpu, model, budget):
    ids = torch.tensor([[5, 6, 7], [1, 2, 3]])
    expected = Decoder(model).logits(ids, 4, budget)
    with gpu:
        actual = Decoder(on_gpu(model)).logits(ids.to(CUDA), 4, budget)
        assert actual.is_cuda
    torch.testing.assert_close(actual, expected)


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
    with torch.no_grad():
        expected = hf_model(**padded("cpu"), **options)
        with gpu:
            model = on_gpu(hf_model)
            model.set_attn_implementation(implementation)
            actual = model(**padded(CUDA), **options)
            assert actual.logits.is_cuda
            assert model.decode_state(actual.last_state, padded(CUDA)["attention_mask"]).is_cuda
    torch.testing.assert_close(actual.logits[:, -1], expected.logits[:, -1])


def test_transformers_training_stays_on_the_gpu(gpu, hf_model):
    with gpu:
        model = on_gpu(hf_model).train()
        ids = padded(CUDA)["input_ids"]
        model(ids, labels=ids).loss.backward()
        assert model.transformer.adapter.weight.grad.is_cuda


@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 2}, {"do_sample": True, "top_k": 5}],
    ids=lambda options: ",".join(options) or "greedy",
)
def test_transformers_generation_stays_on_the_gpu(gpu, hf_model, options):
    options = {"max_new_tokens": 4, "num_steps": 3, "do_sample": False, "disable_compile": True} | options
    torch.manual_seed(0)
    expected = hf_model.generate(**padded("cpu"), **options)
    with gpu:
        torch.manual_seed(0)
        actual = on_gpu(hf_model).generate(**padded(CUDA), **options)
        assert actual.is_cuda
    assert torch.equal(actual, expected)


def test_transformers_forward_with_a_static_cache_stays_on_the_gpu(gpu, hf_model):
    with gpu, torch.no_grad():
        model = on_gpu(hf_model)
        cache = StaticCache(config=model.config, max_cache_len=6)
        ids = padded(CUDA)["input_ids"]
        model(ids, past_key_values=cache)
        assert model(ids[:, :1], past_key_values=cache).logits.is_cuda


def test_engine_inside_generate_stays_on_the_gpu(gpu, hf_model):
    options = {"max_new_tokens": 4, "do_sample": False, "num_steps": 3, "use_cache": False}
    expected = hf_model.generate(**padded("cpu"), **options)
    with gpu:
        actual = on_gpu(hf_model).generate(**padded(CUDA), custom_generate=Engine(EngineOptions()), **options)
        assert actual.is_cuda
    assert torch.equal(actual, expected)


def test_budget_forcing_inside_generate_stays_on_the_gpu(gpu, hf_model):
    budget = ThinkingBudget((1,), (2,), (4,), at_most=2)
    with gpu:
        model, batch = on_gpu(hf_model), padded(CUDA)
        forcing = BudgetForcing(budget, attention_mask=batch["attention_mask"])
        written = model.generate(**batch, logits_processor=[forcing], max_new_tokens=4, do_sample=False, num_steps=2)
        assert written.is_cuda
    assert written[0, 4].item() == 1


def test_wrapped_training_model_stays_on_the_gpu(gpu, model):
    with gpu:
        wrapped = wrap(on_gpu(model))
        assert wrapped.device == CUDA
        assert wrapped(torch.arange(4, device=CUDA)[None]).logits.is_cuda


def analysis(model, folder):
    """Return the arrays of an analysis of two windows."""
    windows = cut([("a", [5, 6, 7, 8, 9, 3, 1]), ("b", [11, 12])], size=16, max_tokens=16)
    folder.mkdir()
    sizes = {"steps": 6, "tokens": 9, "windows": 2, "candidates": 3, "components": 2, "rules": 2, "seeds": 1,
             "chosen": 1, "width": 32}  # fmt: skip
    recording = create(folder, sizes)
    with torch.no_grad():
        converged = converge(model, windows, recording, 2, 16)
        record(model, windows, recording, converged, [StateChange(0.3), exit_rule("kl")], [8])
        record_paths(model, windows, recording, converged, 16)
        rows = measure_jacobian(model, windows, [2], [0, 8])
    arrays = {name: getattr(recording, name) for name in type(recording).__dataclass_fields__}
    return {**arrays, "radius": np.array([row["radius"] for row in rows])}


def test_analysis_stays_on_the_gpu(gpu, model, tmp_path):
    expected = analysis(model, tmp_path / "cpu")
    with gpu:
        found = analysis(on_gpu(model), tmp_path / "gpu")
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6, err_msg=name)
