import math

import pytest
import torch

from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.training.optimizer import (
    HuginnAdam,
    OptimizerConfig,
    build_optimizer,
    clip_gradients,
    learning_rate,
)


def reference_steps(weight, gradients, lr, decay, rates):
    """facts of arXiv 2502.05171, section 4.3, scalar by scalar in fp64."""
    w, m, v = weight.double().flatten().tolist(), None, None
    for t, (grad, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        g = grad.double().flatten().tolist()
        m = g if m is None else m
        v = [x * x for x in g] if v is None else v
        m = [0.9 * a + 0.1 * b for a, b in zip(m, g, strict=True)]
        v = [0.95 * a + 0.05 * b * b for a, b in zip(v, g, strict=True)]
        rms = math.sqrt(sum(b * b / a for a, b in zip(v, g, strict=True)) / len(g))
        for i in range(len(w)):
            update = math.atan2(m[i] / (1 - 0.9**t), math.sqrt(v[i] / (1 - 0.95**t)))
            w[i] = w[i] * (1 - rate / lr * decay) - rate * update / max(1.0, rms)
    return torch.tensor(w, dtype=torch.float64).view_as(weight)


def test_huginn_adam_follows_the_paper():
    torch.manual_seed(0)
    weight = torch.randn(3, 5, dtype=torch.float64)
    gradients = [torch.randn(3, 5, dtype=torch.float64) * 10**scale for scale in (0, 1.5, -2, 3)]
    rates = [1e-2, 2e-2, 2e-2, 5e-3]
    p = torch.nn.Parameter(weight.clone())
    optimizer = HuginnAdam([p], lr=2e-2, weight_decay=0.1)
    for grad, rate in zip(gradients, rates, strict=True):
        p.grad = grad.clone()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    torch.testing.assert_close(p.data, reference_steps(weight, gradients, 2e-2, 0.1, rates), rtol=1e-12, atol=1e-12)


def test_huginn_adam_bears_zero_gradients():
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = HuginnAdam([p], lr=0.1)
    p.grad = torch.zeros(4)
    optimizer.step()
    assert torch.equal(p.data, torch.ones(4))


@pytest.mark.parametrize("name", ["huginn", "adamw"])
def test_only_matrices_decay(name):
    model = RecurrentDepthModel(ModelConfig())
    model.initialise(0)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=0.1, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for key, p in model.named_parameters():
        unmoved = torch.equal(p, before[key])
        assert unmoved == (p.ndim == 1 or key.endswith("qk_bias")), key


def test_schedule_warms_up_holds_and_cools_down():
    config = OptimizerConfig(lr=1.0, warmup_steps=4, cooldown_steps=5)
    rates = [learning_rate(config, step, 20) for step in range(20)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4:15] == [1.0] * 11
    assert rates[15:] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_gradients_are_clipped_to_the_norm():
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0, 0]), torch.tensor([0, 4.0])
    assert clip_gradients(parameters, 1.0).item() == pytest.approx(5.0)
    assert math.hypot(*(p.grad.norm().item() for p in parameters)) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"gradient_clip": 0.0}, {"betas": (0.9, 1.0)}, {"warmup_steps": -1}])
def test_impossible_values_name_their_field(wrong):
    with pytest.raises(ValueError, match=f"optimizer.{next(iter(wrong))}"):
        OptimizerConfig(**wrong)
