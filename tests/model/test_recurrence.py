"""Depth sampling, states and gradients of the loop; modules that replace those of a block."""

import dataclasses
import statistics

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.layers import RMSNorm
from recurrent_depth.model.recurrence import sample_depth, split_steps
from recurrent_depth.model.transformer import RecurrentDepthModel

CONFIG = ModelConfig(n_embd=32, n_heads=2, intermediate_size=48, n_layers_in_recurrent_block=2, vocab_size=50)
HUGINN = dataclasses.replace(CONFIG, mean_recurrence=32, mean_backprop_depth=8)


@pytest.fixture
def model():
    model = RecurrentDepthModel(CONFIG).double()
    model.initialise(0)
    return model


@pytest.fixture
def ids():
    return torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_sampled_depths_have_the_published_statistics():
    totals = [sum(sample_depth(HUGINN, seed=0, step=step, micro_step=0)) for step in range(20_000)]
    assert statistics.mean(totals) == pytest.approx(33, abs=0.4)
    assert statistics.median(totals) == pytest.approx(29, abs=1)
    counts = torch.bincount(torch.tensor(totals)).float()
    smooth = torch.nn.functional.avg_pool1d(counts[None, None], 5, 1, 2)[0, 0]
    assert smooth.argmax().item() == pytest.approx(24, abs=3)
    assert max(k for _, k in (sample_depth(HUGINN, seed=0, step=s, micro_step=0) for s in range(500))) == 8


def test_sampled_depth_depends_only_on_seed_step_and_micro_step():
    def depths(**changes):
        return [sample_depth(HUGINN, **({"seed": 1, "step": s, "micro_step": 0} | changes)) for s in range(50)]

    assert depths() == depths()
    assert depths() != depths(seed=2)
    assert depths() != depths(micro_step=1)


def test_fixed_depth_and_full_backpropagation_give_constant_depths():
    fixed = dataclasses.replace(HUGINN, sampling_scheme="fixed")
    assert {sample_depth(fixed, seed=0, step=s, micro_step=0) for s in range(20)} == {(24, 8)}
    full = dataclasses.replace(HUGINN, mean_backprop_depth=None)
    drawn = [sample_depth(full, seed=0, step=s, micro_step=0) for s in range(20)]
    assert all(n == 0 for n, _ in drawn)
    assert len({k for _, k in drawn}) > 5


@pytest.mark.parametrize("wrong", [0, -1, (0, 0), (-1, 3)])
def test_num_steps_refuses_invalid_values(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        split_steps(wrong)


def test_iterations_can_be_continued_from_a_state(model, ids):
    whole = model(ids, num_steps=7, return_states=True)
    first = model(ids, num_steps=3)
    second = model(ids, num_steps=4, input_states=first.state)
    torch.testing.assert_close(second.logits, whole.logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first.state, whole.states[2], rtol=1e-12, atol=1e-12)


def test_iterations_without_gradient_change_only_gradients(model, ids):
    whole = model(ids, num_steps=6, labels=ids)
    cut = model(ids, num_steps=(4, 2), labels=ids)
    assert torch.equal(whole.logits, cut.logits)
    state = model(ids, num_steps=4).state.detach()
    by_hand = gradients(model, model(ids, num_steps=2, input_states=state, labels=ids).loss)
    for name, gradient in gradients(model, cut.loss).items():
        torch.testing.assert_close(gradient, by_hand[name], rtol=1e-10, atol=1e-12)
    full = gradients(model, whole.loss)
    assert not torch.allclose(full["transformer.adapter.weight"], by_hand["transformer.adapter.weight"])


@pytest.mark.parametrize("recompute", ["step", "block"])
def test_recomputation_gives_the_same_gradients(model, ids, recompute):
    expected = gradients(model, model(ids, num_steps=(2, 3), labels=ids).loss)
    model.transformer.core_block.activation_checkpointing = recompute
    actual = gradients(model, model(ids, num_steps=(2, 3), labels=ids).loss)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-14)


def test_replaced_adapter_is_called(model, ids):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    plain = model(ids, num_steps=3).logits
    wrapped = Doubled(64, 32, bias=False).double()
    wrapped.weight = torch.nn.Parameter(model.transformer.adapter.weight.detach() / 2)
    model.transformer.adapter = wrapped
    torch.testing.assert_close(model(ids, num_steps=3).logits, plain, rtol=1e-12, atol=1e-12)


def test_hooks_see_every_module_of_a_block(model, ids):
    """Hooks fire once per call and see the output of the module; a module that replaces a norm is used."""
    core = model.transformer.core_block[0]
    seen = []
    for name, module in core.named_children():
        module.register_forward_hook(lambda module, args, y, name=name: seen.append(name))
    plain = model(ids, num_steps=3).logits
    assert seen == ["norm_1", "attn", "norm_2", "norm_3", "mlp", "norm_4"] * 3

    class Doubled(RMSNorm):
        def forward(self, x, branch=None):
            return 2 * super().forward(x, branch)

    for place in ("norm_1", "norm_2", "norm_3", "norm_4"):
        original = getattr(core, place)
        setattr(core, place, Doubled(32, 1e-6).double())
        assert not torch.allclose(model(ids, num_steps=3).logits, plain)
        setattr(core, place, original)


@pytest.mark.parametrize("option", ["norm", "core_norm"])
def test_configured_norm_is_used_in_all_blocks_or_in_core(ids, option):
    """The outputs equal those with a layer norm computed by hand; parameters keep their names."""
    layer = RecurrentDepthModel(dataclasses.replace(CONFIG, **{option: "layer"})).double()
    rms = RecurrentDepthModel(CONFIG).double()
    layer.initialise(0)
    rms.initialise(0)
    assert list(layer.state_dict()) == list(rms.state_dict())

    class ByHand(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, x, branch=None):
            h = x if branch is None else x + branch
            h = h - h.mean(-1, keepdim=True)
            return h / (h.square().mean(-1, keepdim=True) + CONFIG.norm_eps).sqrt() * self.weight

    assert not torch.allclose(layer(ids, num_steps=3).logits, rms(ids, num_steps=3).logits)
    others = (*rms.transformer.prelude, *rms.transformer.coda) if option == "norm" else ()
    for block in (*rms.transformer.core_block, *others):
        for place in ("norm_1", "norm_2", "norm_3", "norm_4"):
            setattr(block, place, ByHand(getattr(block, place).weight))
    if option == "norm":
        rms.transformer.ln_f = ByHand(rms.transformer.ln_f.weight)
    expected = rms(ids, num_steps=3).logits
    torch.testing.assert_close(layer(ids, num_steps=3).logits, expected, rtol=1e-12, atol=1e-12)


class QuantisedWeight(torch.Tensor):
    """A weight as in torchao: nn.Linear keeps its type, and the weight supports only the matrix product."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            return super().__torch_function__(function, types, args, kwargs or {}).as_subclass(torch.Tensor)
        if function is torch.Tensor.split:
            raise NotImplementedError("a quantised weight cannot be split")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_adapter_with_a_quantised_weight_is_called(model, ids):
    plain = model(ids, num_steps=3).logits
    weight = model.transformer.adapter.weight.detach().as_subclass(QuantisedWeight)
    model.transformer.adapter.weight = torch.nn.Parameter(weight, requires_grad=False)
    assert type(model.transformer.adapter) is torch.nn.Linear
    torch.testing.assert_close(model(ids, num_steps=3).logits, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_model_quantised_by_torchao_runs(scheme):
    quantization = pytest.importorskip("torchao.quantization")
    model = RecurrentDepthModel(CONFIG)
    model.initialise(0)
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(ids, num_steps=3).logits
        quantization.quantize_(model.transformer, getattr(quantization, scheme)())
        difference = (model(ids, num_steps=3).logits - plain).abs().max()
    assert 0 < difference < 0.1 * plain.abs().max()


def test_adapter_with_bias_hooks_or_another_forward_is_called(model, ids):
    """Computing the product with the slices of the weight would ignore them."""
    adapter, calls = model.transformer.adapter, []
    plain = model(ids, num_steps=3).logits
    with adapter.register_forward_hook(lambda module, args, y: calls.append(y.shape)):
        torch.testing.assert_close(model(ids, num_steps=3).logits, plain, rtol=1e-12, atol=1e-12)
    assert len(calls) == 3
    adapter.forward = lambda x: 2 * torch.nn.functional.linear(x, adapter.weight / 2)
    torch.testing.assert_close(model(ids, num_steps=3).logits, plain, rtol=1e-12, atol=1e-12)
    adapter.forward = lambda x: 2 * torch.nn.functional.linear(x, adapter.weight)
    doubled = model(ids, num_steps=3).logits
    del adapter.forward
    assert not torch.allclose(doubled, plain)
    adapter.bias = torch.nn.Parameter(torch.ones(32, dtype=torch.float64))
    assert not torch.allclose(model(ids, num_steps=3).logits, plain)


@pytest.mark.slow
def test_compiled_blocks_have_two_graphs_at_any_depth():
    torch._dynamo.reset()
    model, plain = RecurrentDepthModel(CONFIG), RecurrentDepthModel(CONFIG)
    model.initialise(0)
    plain.initialise(0)
    counter = CompileCounterWithBackend("aot_eager")
    core = model.transformer.core_block[0]
    core.compile(backend=counter)
    ids = torch.randint(0, 50, (2, 9))
    for depth in [(0, 1), (3, 2), (1, 4), (6, 1), (0, 5)]:
        actual = gradients(model, model(ids, num_steps=depth, labels=ids).loss)
        expected = gradients(plain, plain(ids, num_steps=depth, labels=ids).loss)
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-6)
    assert counter.frame_count <= 2
