"""What the kernels are compared with: PyTorch in fp64."""

import torch

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4.1e-3}
"""Largest error over largest value; in bfloat16 it is the rounding of the output, 2^-8."""

DTYPES = [torch.float32, torch.bfloat16]


def random(*shape, dtype=torch.float32, device="cpu", seed=0, gradient=True):
    """Normal numbers, a leaf that takes gradients."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype).requires_grad_(gradient)


def scattered(x):
    """The same values in memory that is not contiguous, and no leaf."""
    return torch.stack([x, x], dim=-1)[..., 0]


def wide(tensors):
    """The same values in fp64, as leaves."""
    return [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in tensors]


def error(actual, expected):
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    scale = expected.abs().max()
    return ((actual.double() - expected.double()).abs().max() / scale.clamp(min=1e-30)).item()


def check(fused, plain, inputs, dtype):
    """Outputs and gradients of `fused(*inputs)` against `plain` of the same numbers in fp64."""
    references = wide(inputs)
    outputs, expected = as_list(fused(*inputs)), as_list(plain(*references))
    directions = [random(*y.shape, dtype=y.dtype, device=y.device, seed=9, gradient=False) for y in outputs]
    gradients = torch.autograd.grad(outputs, inputs, directions)
    exact = torch.autograd.grad(expected, references, [d.double() for d in directions])
    assert all(x.dtype == g.dtype for x, g in zip(inputs, gradients, strict=True))
    for actual, wanted in zip([*outputs, *gradients], [*expected, *exact], strict=True):
        assert error(actual, wanted) < TOLERANCE[dtype]


def as_list(y):
    return [y] if isinstance(y, torch.Tensor) else list(y)
