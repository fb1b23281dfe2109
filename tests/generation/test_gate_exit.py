"""The exit rule `gate` against a loop over iterations, in fp64: batch and single, modes, order of prompts, export."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from recurrent_depth.generation.config import Captured, EngineOptions, Refill
from recurrent_depth.generation.exits import GateExit, exit_rule
from recurrent_depth.generation.request import Decoding
from recurrent_depth.hf.engine import Engine, decoding
from recurrent_depth.hf.export import export
from recurrent_depth.hf.loading import load_model, wrap
from recurrent_depth.model.config import GateConfig
from recurrent_depth.options import ExportConfig
from support import decode, lively_model, run_without_our_package

PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [3], [40, 2, 2, 31]]
R, Q = 8, 0.6


def gated_model(kind="state_and_change"):
    model = lively_model(block_size=64, gate=GateConfig(input=kind))
    with torch.no_grad():
        model.transformer.gate.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
        model.transformer.gate.bias.fill_(-1.0)
    return model


@pytest.fixture(scope="module", params=["state", "state_and_change"])
def model(request):
    return gated_model(request.param)


def stopping(model, threshold=Q):
    return Decoding(max_new_tokens=6, num_steps=R, exit=GateExit(model.transformer.gate, threshold))


@torch.no_grad()
def exits_of_first_token(model, token, threshold):
    """Return the iteration at which a prompt of one token stops, from its states and the definition of the gate."""
    gate, states = model.transformer.gate, [torch.zeros(model.config.n_embd, dtype=torch.float64)]
    left = 1.0
    for r in range(1, R + 1):
        states.append(model(torch.tensor([[token]]), num_steps=r).state[0, 0])
        size = states[-1].pow(2).mean().sqrt()
        x = torch.cat([states[-1] / size, (states[-1] - states[-2]) / size])[: len(gate.weight)]
        left *= 1 - 1 / (1 + float(torch.exp(-(x @ gate.weight + gate.bias))))
        if 1 - left >= threshold:
            return r
    return R


def test_gate_exit_tells_thresholds_close_to_one_apart():
    """With lambda = 1/2 everywhere a token has gone on with probability 2^-t; float32 has no 1 - 2^-30."""
    model = gated_model().float()
    torch.nn.init.zeros_(model.transformer.gate.weight)
    torch.nn.init.zeros_(model.transformer.gate.bias)
    for t in (20, 30, 40):
        rule = GateExit(model.transformer.gate, 1 - 2.0**-t)
        found = decode(model, [[5]], Decoding(max_new_tokens=1, num_steps=64, exit=rule))
        assert found.steps == [[t]]


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9, 1.0])
def test_gate_exit_stops_at_the_cumulative_probability(model, threshold):
    prompts = [[token] for token in range(0, 50, 3)]
    expected = [exits_of_first_token(model, *prompt, threshold) for prompt in prompts]
    found = decode(model, prompts, stopping(model, threshold))
    assert [steps[0] for steps in found.steps] == expected
    assert len(set(expected)) > 1 or threshold == 1.0


@pytest.mark.parametrize("mode", [None, Refill(2), Captured()])
def test_gate_exit_of_a_batch_equals_single_requests(model, mode):
    together = decode(model, PROMPTS, stopping(model), mode)
    alone = [decode(model, [prompt], stopping(model)) for prompt in PROMPTS]
    assert together.tokens == [found.tokens[0] for found in alone]
    assert together.steps == [found.steps[0] for found in alone]
    assert len({steps for row in together.steps for steps in row}) > 2


@pytest.mark.parametrize("budget", [1, 2, 4])
def test_gate_exit_of_a_batch_equals_single_requests_with_a_cache_budget(model, budget):
    options = dataclasses.replace(stopping(model), cache_budget=budget)
    together = decode(model, PROMPTS, options)
    alone = [decode(model, [prompt], options) for prompt in PROMPTS]
    assert (together.tokens, together.steps) == (
        [found.tokens[0] for found in alone], [found.steps[0] for found in alone]
    )  # fmt: skip
    assert decode(model, PROMPTS, options, Captured()).steps == together.steps


def test_gate_exit_stops_prompts_in_order(model):
    """The longer prompt takes the tokens of its beginning with the same iterations, whatever follows."""
    long, options = [5, 9, 33, 14, 2, 7, 41], stopping(model)
    totals = [
        sum(decode(model, [long[:n]], options).steps[0][:1]) * n for n in range(1, len(long) + 1)
    ]  # fmt: skip
    each = [round(after - before, 6) for before, after in zip([0, *totals], totals, strict=False)]
    assert each == sorted(each)


def test_gate_rule_without_a_gate_says_what_to_do():
    with pytest.raises(ValueError, match=r"the model has no exit gate; train one \(docs/stopping.md\), or choose"):
        exit_rule("gate")
    with pytest.raises(ValueError, match=r"exit_threshold is 1.5; it must lie in \(0, 1\]"):
        exit_rule("gate", 1.5, gated_model().transformer.gate)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a saved model with a gate and its export."""
    folder = tmp_path_factory.mktemp("gated")
    wrap(gated_model().float()).save_pretrained(folder / "saved")
    return folder / "saved", export(ExportConfig(model=str(folder / "saved"), out=str(folder / "export")))


def test_gate_survives_export_with_equal_exits(folders):
    expected = decode(gated_model().float(), PROMPTS, stopping(gated_model().float()))
    for folder in folders:
        loaded, _ = load_model(folder)
        found = decode(loaded, PROMPTS, decoding(
            EngineOptions(num_steps=R, exit="gate", exit_threshold=Q), gate=loaded.transformer.gate, max_new_tokens=6
        ))  # fmt: skip
        assert (found.tokens, found.steps) == (expected.tokens, expected.steps)
        assert "an exit gate" in (folders[1] / "README.md").read_text()


def test_generate_of_transformers_takes_the_gate(folders):
    model = AutoModelForCausalLM.from_pretrained(folders[1])
    engine = Engine(EngineOptions(exit="gate", exit_threshold=Q))
    padding = [5 - len(prompt) for prompt in PROMPTS]
    ids = torch.tensor([[0] * pad + prompt for pad, prompt in zip(padding, PROMPTS, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (5 - pad) for pad in padding])
    options = {"num_steps": R, "max_new_tokens": 6, "use_cache": False, "do_sample": False}
    written = model.generate(ids, attention_mask=mask, custom_generate=engine, **options)
    expected = decode(model, PROMPTS, stopping(model))
    assert (written[:, 5:].tolist(), engine.result.steps) == (expected.tokens, expected.steps)


@pytest.mark.slow
def test_gate_loads_where_our_package_is_absent(folders, tmp_path):
    run_without_our_package(
        f"""
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folders[1])!r}, trust_remote_code=True)
states = [model(torch.tensor([[5, 6]]), num_steps=r).last_state for r in (2, 3)]
torch.save(model.transformer.gate(*states).detach(), {str(tmp_path / "stop.pt")!r})
""",
        tmp_path,
    )
    model, ids = gated_model().float(), torch.tensor([[5, 6]])
    with torch.no_grad():
        expected = model.transformer.gate(*(model(ids, num_steps=r).state for r in (2, 3)))
    torch.testing.assert_close(torch.load(tmp_path / "stop.pt", weights_only=True), expected)


def test_model_without_a_gate_has_no_trace_of_one(tmp_path):
    wrap(lively_model().float()).save_pretrained(tmp_path)
    assert "gate" not in (tmp_path / "config.json").read_text()
    assert not [name for file in Path(tmp_path).glob("*.safetensors") for name in load_file(file) if ".gate." in name]
