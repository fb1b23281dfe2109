import math

import pytest
import torch

from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.transformer import RecurrentDepthModel
from recurrent_depth.training.config import OptimizerConfig
from recurrent_depth.training.optimizer import HuginnAdam, MuonAdamW, build_optimizer, clip_gradients, orthogonalised


def reference_steps(weight, gradients, lr, decay, rates):
    """Return the weights after the updates of arXiv 2502.05171, section 4.3, computed per scalar in fp64."""
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


def test_huginn_adam_equals_the_paper():
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


def test_huginn_adam_handles_zero_gradients():
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = HuginnAdam([p], lr=0.1)
    p.grad = torch.zeros(4)
    optimizer.step()
    assert torch.equal(p.data, torch.ones(4))


@pytest.mark.parametrize("name", ["huginn", "adamw", "nadamw", "muon"])
def test_weight_decay_applies_to_matrices_only(name):
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


def test_gradient_clipping_limits_the_norm():
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0, 0]), torch.tensor([0, 4.0])
    assert clip_gradients(parameters, 1.0).item() == pytest.approx(5.0)
    assert math.hypot(*(p.grad.norm().item() for p in parameters)) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"gradient_clip": 0.0}, {"betas": (0.9, 1.0)}, {"warmup_steps": -1}])
def test_optimizer_options_refuse_invalid_values(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} is"):
        OptimizerConfig(**wrong)


def stepped(optimizer, weights, gradients):
    """Return the weights after one training step per gradient."""
    for grads in gradients:
        for p, grad in zip(weights, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    return [p.detach().clone() for p in weights]


def test_muon_and_adamw_equal_torch():
    torch.manual_seed(0)
    shapes = [(6, 9), (9, 4), (7,)]
    start = [torch.randn(shape) for shape in shapes]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(4)]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    groups = [{"params": ours[:2], "muon": True, "weight_decay": 0.3}, {"params": ours[2:]}]
    actual = stepped(MuonAdamW(groups, lr=0.02, weight_decay=0.1), ours, gradients)
    matrices = torch.optim.Muon(theirs[:2], lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    expected = stepped(matrices, theirs[:2], [grads[:2] for grads in gradients])
    rest = torch.optim.AdamW(theirs[2:], lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)
    expected += stepped(rest, theirs[2:], [grads[2:] for grads in gradients])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_orthogonalised_matrix_has_singular_values_near_one():
    torch.manual_seed(0)
    for shape in [(8, 8), (5, 20), (20, 5)]:
        u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
        matrix = u * torch.linspace(0.2, 1.0, min(shape)).double() @ v
        result = orthogonalised(matrix)
        singular = torch.linalg.svdvals(result)
        assert ((singular > 0.6) & (singular < 1.3)).all()
        off = u.T @ result @ v.T  # diagonal in the bases of the matrix: only singular values change
        torch.testing.assert_close(off, off.diagonal().diag(), rtol=0, atol=1e-10)


def test_muon_on_a_cpu_orthogonalises_in_float32():
    model = RecurrentDepthModel(ModelConfig())
    model.initialise(seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(name="muon", lr=0.02, weight_decay=0.0))
    p = model.transformer.adapter.weight
    before, p.grad = p.detach().double(), torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    momentum = 0.05 * p.grad.double()
    direction = orthogonalised(p.grad.double().lerp(momentum, 0.95))
    torch.testing.assert_close(p.double(), before - 0.02 * 0.2 * 128**0.5 * direction, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("weight", "parts"), [("attn.Wqkv", 3), ("mlp.fc", 2)])
def test_muon_updates_fused_projections_like_separate_matrices(weight, parts):
    """q, k, v and gate, up are one parameter each, but torch's Muon on the separate matrices gives the same update."""
    model = RecurrentDepthModel(ModelConfig())
    model.initialise(seed=0)
    p = model.transformer.core_block[0].get_submodule(weight).weight
    separate = [torch.nn.Parameter(matrix.detach().clone()) for matrix in p.chunk(parts)]
    ours = build_optimizer(model, OptimizerConfig(name="muon", lr=0.02, weight_decay=0.3))
    theirs = torch.optim.Muon(separate, lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    rng = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 30.0, 0.1])[:parts].repeat_interleave(len(separate[0]))[:, None]
    for _ in range(3):
        grad = torch.randn(p.shape, generator=rng) * scales
        before = p.detach().clone()
        stepped(ours, [p], [[grad]])
        expected = torch.cat(stepped(theirs, separate, [grad.chunk(parts)]))
        # torch orthogonalises in bfloat16, this optimizer on a CPU in float32
        assert (p - expected).norm() < 0.05 * (p - before).norm()


def test_muon_applies_to_the_matrices_of_the_blocks():
    model = RecurrentDepthModel(ModelConfig())
    optimizer = build_optimizer(model, OptimizerConfig(name="muon"))
    names = {p: name for name, p in model.named_parameters()}
    taken = {names[p] for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    matrices = ("Wqkv.weight", "proj.weight", "fc.weight", "adapter.weight")
    assert taken == {name for name in names.values() if name.endswith(matrices)}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
