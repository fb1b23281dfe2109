"""The options of a model in vLLM and the checks of requests. Needs no vLLM."""

from types import SimpleNamespace

import pytest
import torch

from recurrent_depth.generation.exits import StateChange
from recurrent_depth.serving.config import ServeConfig
from recurrent_depth.serving.serve import chosen_engine
from recurrent_depth.serving.vllm.core import Stopping, iterate
from recurrent_depth.serving.vllm.options import DepthOptions
from support import lively_model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"default_num_steps": 9}, "default_num_steps is 9"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"cache_budget": 0}, "cache_budget is 0"),
        ({"exit": "kl"}, "only state-change is implemented"),
        ({"exit": "gate"}, "only state-change is implemented"),
        ({"exit_threshold": 0.1}, "exit_threshold is given without exit"),
        ({"cache_budget": 2, "default_num_steps": 4}, "needs the same iterations for all tokens"),
        ({"cache_budget": 2, "exit": "state-change"}, "needs the same iterations for all tokens"),
    ],
)
def test_options_that_vllm_cannot_serve_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DepthOptions(**({"num_steps": 8} | options))


def test_options_come_from_the_models_configuration():
    hf_config = SimpleNamespace(
        num_steps=None, mean_recurrence=16, state_seed=None, cache_budget=1, exit="state-change"
    )
    options = DepthOptions.of(hf_config)
    assert options == DepthOptions(num_steps=16, cache_budget=1, exit="state-change")
    hf_config.state_seed = 3
    with pytest.raises(ValueError, match="state_seed"):
        DepthOptions.of(hf_config)


@pytest.mark.parametrize(
    ("options", "one_pass"),
    [
        ({}, False), ({"cache_budget": 8}, False), ({"cache_budget": 1}, True), ({"cache_budget": 4}, True),
        ({"exit": "state-change"}, False), ({"exit": "state-change", "exit_prompt": True}, True),
    ],
)  # fmt: skip
def test_one_pass_is_needed_with_shared_entries_and_exits_in_order(options, one_pass):
    assert DepthOptions(num_steps=8, **options).needs_one_pass == one_pass


@pytest.mark.parametrize("wrong", [0, 9, -1, 10**6, 2.0, "4", True, [4]])
def test_request_beyond_the_server_is_refused(wrong):
    with pytest.raises(ValueError, match="must be an integer from 1 to 8"):
        DepthOptions(num_steps=8).check_request(wrong)
    DepthOptions(num_steps=8).check_request(8)
    DepthOptions(num_steps=8).check_request(None)
    with pytest.raises(ValueError, match="from 8 to 8"):
        DepthOptions(num_steps=8, cache_budget=2).check_request(4)


@pytest.mark.parametrize("rule", [None, StateChange(0.3)])
def test_iterations_of_a_flat_batch_equal_those_of_each_request(rule):
    """Two requests of 5 and 3 tokens, one after another in a flat batch, with depths 6 and 2; fp64, one pass.

    The attention here has a cache per layer index in a dictionary; a token reads what its request wrote.
    """
    model = lively_model()
    part, core = model.transformer, model.transformer.core_block
    starts = torch.tensor([0, 5, 8])
    e = torch.randn(1, 8, model.config.n_embd, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotary = tuple(x.expand(1, 8, -1) for x in (torch.ones(1, 1, 16).double(), torch.zeros(1, 1, 16).double()))

    def paged(q, k, v, layer_index):
        rows = []
        for first, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            heads = [x[first:end].view(1, end - first, 2, -1).transpose(1, 2) for x in (q, k, v)]
            y = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
            rows.append(y.transpose(1, 2).reshape(end - first, -1))
        return torch.cat(rows)

    steps = torch.tensor([6] * 5 + [2] * 3)
    stopping = Stopping(steps, torch.ones(8, dtype=torch.bool), rule, None if rule is None else starts)
    with torch.no_grad():
        found = iterate(part, e, rotary, paged, stopping, most=6)
    for first, end, most in ((0, 5, 6), (5, 8, 2)):
        assert torch.allclose(found[:, first:end], brute_force(part, core, e[:, first:end], rotary, rule, most))


def brute_force(part, core, e, rotary, rule, most):
    """Return the states of one request by iterating every token and keeping the states of stopped ones."""
    from recurrent_depth.model.attention import merge_heads

    T = e.shape[1]
    rotary = tuple(x[:, :T] for x in rotary)
    state, stopped = torch.zeros_like(e), torch.zeros(T, dtype=torch.bool)
    entries = {}

    def attention(projection, layer_index):
        q, k, v = projection.heads()
        layer = layer_index % len(core)
        if layer in entries:  # stopped tokens are read at their last keys and values
            for new, old in zip((k, v), entries[layer], strict=True):
                new[:, :, stopped] = old[:, :, stopped]
        entries[layer] = (k, v)
        return merge_heads(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))

    injected, adapt = part.injection(e)
    for i in range(most):
        with torch.no_grad():
            after = core.step(state, injected, adapt, rotary, attention, i)
        new = torch.where(stopped[None, :, None], state, after)
        if rule is not None:
            converged = (new - state).norm(dim=-1)[0] < rule.threshold * new.norm(dim=-1)[0]
            stopped = (stopped | converged).cumprod(0).bool()  # in order
        state = new
    return state


@pytest.mark.parametrize(
    ("options", "message"),
    [({"engine": "vllm"}, "vLLM|vllm"), ({"engine": "transformers", "tensor_parallel": 2}, "tensor_parallel is 2")],
)
def test_engine_that_cannot_run_is_refused(options, message, monkeypatch):
    monkeypatch.setattr("recurrent_depth.serving.serve.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        chosen_engine(ServeConfig("m", **options))
    assert chosen_engine(ServeConfig("m")) == "transformers"
