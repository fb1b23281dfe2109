"""Attention at decode over the recurrence-indexed cache, against one query and one column at a time in fp64."""

import itertools
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from recurrent_depth_kernels.decode_attention import decode_attention, splits_for
from recurrent_depth_kernels.launch import watched

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3}


def brute_force(q, entries, depths, mask, steps, lengths):
    """[B, H, T, K] in fp64: the definition, without vectors."""
    q, entries = q.double(), entries.double()
    (B, H, T, K), (R, _, _, G, _, _) = q.shape, entries.shape
    out = torch.zeros_like(q)
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        own = int(lengths[b]) - T + t
        seen = [s for s in range(own + 1) if s == own or mask is None or mask[b, s]]
        slots = [min(int(steps[b]) % R, int(depths[b, s]) - 1) for s in seen]  # the place read, or the deepest below it
        keys = torch.stack([entries[r, 0, b, h * G // H, s] for r, s in zip(slots, seen, strict=True)])
        values = torch.stack([entries[r, 1, b, h * G // H, s] for r, s in zip(slots, seen, strict=True)])
        out[b, h, t] = torch.softmax(keys @ q[b, h, t] / math.sqrt(K), 0) @ values
    return out


def case(B=2, H=2, G=2, T=1, K=96, S=70, R=3, dtype=torch.float32, device="cpu", seed=0):
    """Random arguments: ragged lengths, depths on both sides of the steps, holes; what nobody may read is NaN."""
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(B, H, T, K, generator=rng).to(dtype)
    entries = torch.randn(R, 2, B, G, S, K, generator=rng).to(dtype)
    depths = torch.randint(1, 2 * R + 1, (B, S), generator=rng)
    steps = torch.randint(0, 2 * R, (B,), generator=rng)
    lengths = torch.randint(T, S + 1, (B,), generator=rng)
    mask = torch.randint(0, 2, (B, S), generator=rng)
    for b in range(B):
        own = torch.arange(S) >= lengths[b] - T
        hidden = (torch.arange(S) >= lengths[b]) | ((mask[b] == 0) & ~own)
        entries[:, :, b, :, hidden] = float("nan")
    return [x.to(device) for x in (q, entries, depths, mask, steps, lengths)]


def check(arguments):
    out = decode_attention(*arguments)
    expected = brute_force(*(x if x is None else x.cpu() for x in arguments))
    assert out.dtype == arguments[0].dtype
    error = (out.double().cpu() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[out.dtype], float(error)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("K", [64, 96, 128])
@pytest.mark.parametrize(("H", "G", "T"), [(2, 2, 1), (4, 2, 1), (2, 2, 3), (6, 2, 2)])
def test_equals_brute_force(device, dtype, K, H, G, T):
    check(case(H=H, G=G, T=T, K=K, dtype=dtype, device=device))


@settings(max_examples=20, deadline=None)
@given(
    B=st.integers(1, 3), G=st.integers(1, 2), group=st.integers(1, 3), T=st.integers(1, 3), K=st.sampled_from([6, 16]),
    room=st.integers(0, 80), R=st.integers(1, 5), seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_brute_force_at_any_shape(B, G, group, T, K, room, R, seed):
    check(case(B, G * group, G, T, K, T + room, R, torch.float64, seed=seed))


def test_one_key_gives_its_value(device):
    q, entries, depths, mask, steps, lengths = case(S=1, R=2, device=device)
    out = decode_attention(q, entries, depths, mask, steps, lengths)
    slot = torch.minimum(steps % 2, depths[:, 0] - 1)
    expected = torch.stack([entries[int(r), 1, b, :, 0] for b, r in enumerate(slot)])
    torch.testing.assert_close(out[:, :, 0], expected)


def test_no_mask_is_a_mask_of_ones(device):
    q, entries, depths, _, steps, lengths = case(device=device)
    entries = entries.nan_to_num(1.0)
    ones = torch.ones_like(depths)
    assert torch.equal(
        decode_attention(q, entries, depths, None, steps, lengths),
        decode_attention(q, entries, depths, ones, steps, lengths),
    )


def test_reads_a_cache_in_place(device):
    """Layers of one cache lie between each other; a layer's part is a view with strides, and boolean masks do."""
    q, entries, depths, mask, steps, lengths = case(R=3, device=device)
    cache = torch.full((2 + 2 * 3, *entries.shape[1:]), float("nan"), device=device)
    cache[3::2] = entries
    q = torch.stack([q, q], dim=-1)[..., 0]  # strides between channels
    out = decode_attention(q, cache[3::2], depths, mask.bool(), steps, lengths)
    expected = decode_attention(q.contiguous(), entries, depths, mask, steps, lengths)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("splits", [1, 2, 8, 32])
def test_the_number_of_splits_changes_nothing(monkeypatch, splits):
    """With 32, most splits have no column at all."""
    monkeypatch.setattr(sys.modules[splits_for.__module__], "splits_for", lambda *sizes: splits)
    for T in (1, 2):
        with watched() as launches:
            check(case(B=1, H=1, G=1, T=T, S=200, dtype=torch.float64))
        assert launches[0].grid[1] == splits


def test_splits_fill_the_device_and_keep_whole_blocks():
    assert splits_for(55, 4096, 32, 528) == 8  # batch 1 of the 3.5B model on 132 processors
    assert splits_for(55 * 64, 4096, 32, 528) == 1
    assert splits_for(1, 64, 32, 528) == 2
    assert splits_for(1, 10**6, 32, 528) == 16


def test_shapes_that_do_not_fit_say_so():
    q, entries, depths, mask, steps, lengths = case()
    with pytest.raises(ValueError, match="must be \\[R, 2, 2, G, S, 96\\]"):
        decode_attention(q, entries[..., :64], depths, mask, steps, lengths)
    with pytest.raises(ValueError, match="side by side"):
        decode_attention(q, entries.transpose(-1, -2).contiguous().transpose(-1, -2), depths, mask, steps, lengths)
    with pytest.raises(ValueError, match="mask"):
        decode_attention(q, entries, depths, mask[:1], steps, lengths)


@pytest.mark.parametrize("T", [1, 2])
def test_torch_sees_the_op(device, T):
    arguments = case(T=T, K=16, S=20, device=device)
    torch.library.opcheck(decode_attention, arguments)
    with FlopCounterMode(display=False) as counter:
        decode_attention(*arguments)
    assert counter.get_total_flops() == 4 * 2 * 2 * T * 20 * 16
