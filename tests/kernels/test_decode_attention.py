"""Decode attention over the cache, against a reference with one query and one column at a time in fp64."""

import itertools
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from recurrent_depth.model import ops
from recurrent_depth_kernels.decode_attention import decode_attention, splits_for
from recurrent_depth_kernels.launch import watched

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3}


def read_by_definition(written, step, released):
    """Return the place at which an iteration reads a token that wrote [(iteration, place), ...]."""
    if released:  # the place of this iteration, or the highest written place below it
        return max(place for _, place in written if place <= step % released)
    own = [place for iteration, place in written if iteration <= step]
    return own[-1]  # the entry of this iteration, or of the last iteration of the token


def brute_force(q, entries, depths, lanes, starts, lengths, steps, released):
    """Return attention [N, H, T, K] in fp64 by its definition."""
    q, entries = q.double(), entries.double()
    (N, H, T, K), (R, _, _, G, _, _) = q.shape, entries.shape
    out = torch.zeros_like(q)
    for n, h, t in itertools.product(range(N), range(H), range(T)):
        lane = n if lanes is None else int(lanes[n])
        seen = range(int(starts[n]), int(lengths[n]) - T + t + 1)
        places = []
        for s in seen:
            written = [(i, i % R) for i in range(int(depths[lane, s]))]
            places.append(read_by_definition(written, int(steps[n]), R if released else 0))
        keys = torch.stack([entries[r, 0, lane, h * G // H, s] for r, s in zip(places, seen, strict=True)])
        values = torch.stack([entries[r, 1, lane, h * G // H, s] for r, s in zip(places, seen, strict=True)])
        out[n, h, t] = torch.softmax(keys @ q[n, h, t] / math.sqrt(K), 0) @ values
    return out


def case(
    N=3, B=2, H=2, G=2, T=1, K=96, S=70, R=3, dtype=torch.float32, device="cpu", seed=0, released=False, lanes=True
):
    """Return random arguments: ragged starts and lengths, depths above and below the iterations; unread entries NaN."""
    rng = torch.Generator().manual_seed(seed)
    N = N if lanes else B
    q = torch.randn(N, H, T, K, generator=rng).to(dtype)
    entries = torch.randn(R, 2, B, G, S, K, generator=rng).to(dtype)
    depths = torch.randint(1, 2 * R + 1, (B, S), generator=rng)
    steps = torch.randint(0, 2 * R, (N,), generator=rng)
    lengths = torch.randint(T, S + 1, (N,), generator=rng)
    starts = (torch.rand(N, generator=rng) * (lengths - T + 1)).long()
    chosen = torch.randint(0, B, (N,), generator=rng) if lanes else None
    for b in range(B):
        readers = [n for n in range(N) if (n if chosen is None else int(chosen[n])) == b]
        used = torch.zeros(S, dtype=torch.bool)
        for n in readers:
            used[starts[n] : lengths[n]] = True
        entries[:, :, b, :, ~used] = float("nan")
    tensors = [q, entries, depths, chosen, starts, lengths, steps]
    return [x if x is None else x.to(device) for x in tensors] + [released]


def check(arguments):
    out = decode_attention(*arguments)
    expected = brute_force(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in arguments))
    assert out.dtype == arguments[0].dtype
    error = (out.double().cpu() - expected).abs().max() / expected.abs().max()
    # Compiled kernels get numbers such as 1 / sqrt(K) in fp32.
    assert error < (1e-7 if out.is_cuda and out.dtype == torch.float64 else TOLERANCE[out.dtype]), float(error)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("K", [64, 96, 128])
@pytest.mark.parametrize(("H", "G", "T"), [(2, 2, 1), (4, 2, 1), (2, 2, 3), (6, 2, 2)])
def test_decode_attention_equals_brute_force(device, dtype, K, H, G, T):
    check(case(H=H, G=G, T=T, K=K, dtype=dtype, device=device))


@settings(max_examples=20, deadline=None)
@given(
    N=st.integers(1, 4), B=st.integers(1, 3), G=st.integers(1, 2), group=st.integers(1, 3), T=st.integers(1, 3),
    K=st.sampled_from([6, 16]), room=st.integers(0, 80), R=st.integers(1, 5), seed=st.integers(0, 99),
    released=st.booleans(), lanes=st.booleans(),
)  # fmt: skip
def test_decode_attention_equals_brute_force_at_any_shape(N, B, G, group, T, K, room, R, seed, released, lanes):
    check(case(N, B, G * group, G, T, K, T + room, R, torch.float64, seed=seed, released=released, lanes=lanes))


@settings(max_examples=20, deadline=None)
@given(R=st.integers(1, 6), seed=st.integers(0, 99), released=st.booleans(), lanes=st.booleans(), T=st.integers(1, 2))
def test_kernel_reads_the_same_entries_as_torch(R, seed, released, lanes, T):
    """The rule is implemented in torch and in Triton; both must agree."""
    arguments = case(R=R, K=6, S=20, T=T, dtype=torch.float64, seed=seed, released=released, lanes=lanes)
    arguments[1] = arguments[1].nan_to_num(0.0)
    expected = ops.decode_attention(*arguments)
    torch.testing.assert_close(decode_attention(*arguments), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("released", [False, True])
def test_read_place_of_torch_equals_the_definition(released):
    for R, depth, step in itertools.product(range(1, 6), range(1, 14), range(14)):
        written = [(i, i % R) for i in range(depth)]
        place = ops.read_place(torch.tensor(step), torch.tensor(depth), R, released)
        assert int(place) == read_by_definition(written, step, R if released else 0)


def test_attention_over_one_key_returns_its_value(device):
    q, entries, depths, lanes, starts, lengths, steps, _ = case(S=1, R=2, device=device)
    out = decode_attention(q, entries, depths, lanes, starts, lengths, steps, False)
    place = torch.minimum(steps, depths[lanes, 0] - 1) % 2
    expected = torch.stack([entries[int(r), 1, int(b), :, 0] for r, b in zip(place, lanes, strict=True)])
    torch.testing.assert_close(out[:, :, 0], expected)


def test_decode_attention_reads_a_view_of_a_cache(device):
    """The entries of a layer are a strided view of the cache, with columns beyond those in use."""
    q, entries, depths, *rest = case(R=3, device=device)
    cache = torch.full((2 + 2 * 3, *entries.shape[1:4], 90, entries.shape[5]), float("nan"), device=device)
    cache[3::2, ..., : entries.shape[4], :] = entries
    q = torch.stack([q, q], dim=-1)[..., 0]  # strides between channels
    out = decode_attention(q, cache[3::2, ..., : entries.shape[4], :], depths, *rest)
    assert torch.equal(out, decode_attention(q.contiguous(), entries, depths, *rest))


@pytest.mark.parametrize("splits", [1, 2, 8, 32])
def test_number_of_splits_does_not_change_the_result(monkeypatch, splits):
    """With 32, most splits have no column at all."""
    monkeypatch.setattr(sys.modules[splits_for.__module__], "splits_for", lambda *sizes: splits)
    for T in (1, 2):
        with watched() as launches:
            check(case(N=1, B=1, H=1, G=1, T=T, S=200, dtype=torch.float64))
        assert launches[0].grid[1] == splits


def test_splits_fill_the_device_with_whole_blocks():
    assert splits_for(55, 4096, 32, 528) == 8  # batch 1 of the 3.5B model on 132 processors
    assert splits_for(55 * 64, 4096, 32, 528) == 1
    assert splits_for(1, 64, 32, 528) == 2
    assert splits_for(1, 10**6, 32, 528) == 16


def test_decode_attention_refuses_wrong_shapes():
    q, entries, depths, *rest = case()
    with pytest.raises(ValueError, match="must be \\[R, 2, B, G, S, 96\\]"):
        decode_attention(q, entries[..., :64], depths, *rest)
    with pytest.raises(ValueError, match="make the cache contiguous"):
        decode_attention(q, entries.transpose(-1, -2).contiguous().transpose(-1, -2), depths, *rest)
    with pytest.raises(ValueError, match="depths"):
        decode_attention(q, entries, depths[:1], *rest)


@pytest.mark.parametrize("T", [1, 2])
def test_decode_attention_passes_opcheck(device, T):
    arguments = case(T=T, K=16, S=20, device=device)
    torch.library.opcheck(decode_attention.overload, arguments)
    with FlopCounterMode(display=False) as counter:
        decode_attention(*arguments)
    assert counter.get_total_flops() == 4 * 3 * 2 * T * 20 * 16
