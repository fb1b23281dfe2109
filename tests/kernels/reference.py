"""The reference for kernels: PyTorch in fp64."""

import torch

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4.1e-3}
"""Largest error relative to the largest value; in bfloat16 the rounding of the output, 2^-8."""

DTYPES = [torch.float32, torch.bfloat16]


def random(*shape, dtype=torch.float32, device="cpu", seed=0, gradient=True):
    """Return normal numbers as a leaf with gradients."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype).requires_grad_(gradient)


def scattered(x):
    """Return the same values in non-contiguous memory; not a leaf."""
    return torch.stack([x, x], dim=-1)[..., 0]


def to_float64(tensors):
    """Return the same values in fp64, as leaves."""
    return [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in tensors]


def error(actual, expected):
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    scale = expected.abs().max()
    return ((actual.double() - expected.double()).abs().max() / scale.clamp(min=1e-30)).item()


def check(fused, plain, inputs, dtype):
    """Compare outputs and gradients of `fused(*inputs)` with `plain` on the same numbers in fp64."""
    references = to_float64(inputs)
    outputs, expected = as_list(fused(*inputs)), as_list(plain(*references))
    directions = [random(*y.shape, dtype=y.dtype, device=y.device, seed=9, gradient=False) for y in outputs]
    gradients = torch.autograd.grad(outputs, inputs, directions)
    exact = torch.autograd.grad(expected, references, [d.double() for d in directions])
    assert all(x.dtype == g.dtype for x, g in zip(inputs, gradients, strict=True))
    for actual, wanted in zip([*outputs, *gradients], [*expected, *exact], strict=True):
        assert error(actual, wanted) < TOLERANCE[dtype]


def as_list(y):
    return [y] if isinstance(y, torch.Tensor) else list(y)
