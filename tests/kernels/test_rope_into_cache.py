"""Bias, rotation and the write to the cache, against a reference with complex numbers in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recurrent_depth_kernels.launch import watched
from recurrent_depth_kernels.rope_into_cache import rope_into_cache

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4.1e-3}


def case(B=2, T=1, H=3, G=3, K=96, S=12, R=3, dtype=torch.float32, device="cpu", seed=0, bias=True, shared=False):
    rng = torch.Generator().manual_seed(seed)
    angles = torch.randn(1 if shared else B, T, K // 2, generator=rng, dtype=torch.float64)
    sin = torch.stack([-angles.sin(), angles.sin()], -1).flatten(-2)
    arguments = {
        "qkv": torch.randn(B, T, (H + 2 * G) * K, generator=rng).to(dtype),
        "q_bias": torch.randn(H, K, generator=rng).to(dtype) if bias else None,
        "k_bias": torch.randn(G, K, generator=rng).to(dtype) if bias else None,
        "cos": angles.cos().repeat_interleave(2, -1).to(torch.float64 if dtype == torch.float64 else torch.float32),
        "sin": sin.to(torch.float64 if dtype == torch.float64 else torch.float32),
        "entries": torch.randn(R, 2, B, G, S, K, generator=rng).to(dtype),
        "steps": torch.randint(0, 2 * R, (B,), generator=rng),
        "columns": torch.randint(0, S - T + 1, (B,), generator=rng),
        "active": torch.randint(0, 2, (B, T), generator=rng).bool(),
    }
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()} | {"n_heads": H}


def brute_force(qkv, q_bias, k_bias, cos, sin, entries, steps, columns, active, n_heads):
    """Return (q, entries) in fp64, computed per head with pairs of channels as complex numbers."""
    (R, _, B, G, _, K), H, T = entries.shape, n_heads, qkv.shape[1]
    heads = qkv.double().view(B, T, H + 2 * G, K)
    entries, q = entries.double().clone(), torch.zeros(B, H, T, K, dtype=torch.float64)

    def turned(x, bias, b, t):
        x = x if bias is None else x + bias.double()
        b = 0 if cos.shape[0] == 1 else b
        turn = torch.complex(cos[b, t, ::2].double(), sin[b, t, 1::2].double())
        return torch.view_as_real(torch.view_as_complex(x.view(-1, 2)) * turn).flatten()

    for b in range(B):
        for t in range(T):
            for h in range(H):
                q[b, h, t] = turned(heads[b, t, h], None if q_bias is None else q_bias[h], b, t)
            for g in range(G if active[b, t] else 0):
                slot, column = int(steps[b]) % R, int(columns[b]) + t
                k = turned(heads[b, t, H + g], None if k_bias is None else k_bias[g], b, t)
                entries[slot, 0, b, g, column], entries[slot, 1, b, g, column] = k, heads[b, t, H + G + g]
    return q, entries


def check(arguments):
    cpu = {k: v.cpu().clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    q, entries = brute_force(**cpu)
    with watched() as launches:
        out = rope_into_cache(**arguments)
    assert len(launches) == 1
    for found, expected in ((out, q), (arguments["entries"], entries)):
        error = (found.double().cpu() - expected).abs().max() / expected.abs().max()
        assert error < TOLERANCE[found.dtype], float(error)
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("K", "H", "G", "T"), [(96, 3, 3, 1), (64, 4, 2, 2), (128, 2, 1, 1)])
def test_rope_into_cache_equals_brute_force(device, dtype, K, H, G, T):
    check(case(T=T, H=H, G=G, K=K, dtype=dtype, device=device))


@settings(max_examples=20, deadline=None)
@given(
    B=st.integers(1, 3), T=st.integers(1, 3), G=st.integers(1, 2), group=st.integers(1, 2),
    K=st.sampled_from([2, 6, 32]), R=st.integers(1, 4), seed=st.integers(0, 99), bias=st.booleans(),
    shared=st.booleans(),
)  # fmt: skip
def test_rope_into_cache_equals_brute_force_at_any_shape(B, T, G, group, K, R, seed, bias, shared):
    check(case(B, T, G * group, G, K, T + 4, R, torch.float64, seed=seed, bias=bias, shared=shared))


def test_rope_into_cache_writes_only_the_entries_of_a_view(device):
    arguments = case(device=device)
    cache = torch.full((2 + 2 * 3, *arguments["entries"].shape[1:]), 7.0, device=device)
    arguments["entries"] = cache[3::2]
    arguments["qkv"] = torch.stack([arguments["qkv"]] * 2, -1)[..., 0]
    arguments["active"][:] = True
    rope_into_cache(**arguments)
    written = (cache != 7).any(-1).nonzero()  # place, k or v, row, head, column
    assert {(int(s), int(b), int(c)) for s, _, b, _, c in written} == {
        (3 + 2 * (int(s) % 3), b, int(c))
        for b, (s, c) in enumerate(zip(arguments["steps"], arguments["columns"], strict=True))
    }
    assert len(written) == 2 * 2 * 3


def test_rope_into_cache_equals_bias_rope_of_the_model(device):
    """The results equal those of `bias_rope` of the model, which training uses."""
    from recurrent_depth.model.ops import bias_rope

    x = case(device=device)
    x["active"][:] = True
    q, k, v = bias_rope(x["qkv"], torch.stack([x["q_bias"], x["k_bias"]])[:, None], x["cos"], x["sin"], 3)
    torch.testing.assert_close(rope_into_cache(**x), q, rtol=1e-5, atol=1e-6)
    for b in range(2):
        kept = x["entries"][int(x["steps"][b]) % 3, :, b, :, int(x["columns"][b])]
        torch.testing.assert_close(kept, torch.stack([k[b, :, 0], v[b, :, 0]]), rtol=1e-5, atol=1e-6)


def test_rope_into_cache_refuses_wrong_shapes():
    arguments = case()
    with pytest.raises(ValueError, match="with 4 query heads it must be"):
        rope_into_cache(**(arguments | {"n_heads": 4}))


def test_rope_into_cache_passes_opcheck(device):
    arguments = case(K=16, device=device)
    torch.library.opcheck(rope_into_cache.overload, tuple(arguments.values()))
