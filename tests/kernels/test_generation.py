"""Decoding with the kernels, which read the cache in place, against decoding in torch, which copies entries."""

from dataclasses import replace

import pytest
import torch

from recurrent_depth.generation.captured import CapturedToken
from recurrent_depth.generation.config import Captured, Wavefront
from recurrent_depth.generation.exits import StateChange
from recurrent_depth.generation.request import Decoding, Requests
from recurrent_depth.model.ops import TORCH_OPS, choose_ops, use_ops
from recurrent_depth_kernels import decode_attention, rope_into_cache
from recurrent_depth_kernels.launch import watched
from support import LLAMA_LIKE, decode, lively_model

PROMPTS = [[5, 6, 7], [11]]
OPTIONS = Decoding(max_new_tokens=3, num_steps=4, exit=StateChange(0.6), cache_budget=2)
FULL = replace(OPTIONS, cache_budget=None)


@pytest.mark.parametrize(
    ("options", "mode", "shape"),
    [
        (OPTIONS, None, {}),
        (OPTIONS, Captured(), {}),
        (FULL, Captured(), {}),
        (replace(OPTIONS, exit=StateChange(0.8)), Captured(), LLAMA_LIKE),
    ],
)
def test_decoding_with_kernels_equals_torch_in_fp64(options, mode, shape):
    model = lively_model(**shape)
    plain = decode(model, PROMPTS, options)
    assert len({steps for row in plain.steps for steps in row[1:]}) > 1
    use_ops(model, replace(TORCH_OPS, decode_attention=decode_attention, rope_into_cache=rope_into_cache))
    with watched() as launches:
        fused = decode(model, PROMPTS, options, mode)
    assert (fused.tokens, fused.steps) == (plain.tokens, plain.steps)
    kernels = {launch.name for launch in launches}
    assert ("attend_many" if shape else "attend_one") in kernels
    assert ("rotate_and_store" in kernels) == (mode is not None)


def test_approximate_wavefront_with_kernels_equals_torch_with_a_full_cache():
    """Positions that have not converged iterate beyond num_steps: they write and read the last place."""
    model = lively_model()
    options, wavefront = Decoding(max_new_tokens=5, num_steps=3), Wavefront(2, width=5, exact=False, threshold=0.02)
    plain = decode(model, PROMPTS, options, wavefront)
    assert plain.computed_iterations > 3 * (len(PROMPTS[0]) + len(PROMPTS[1]) + 2 * 5)
    use_ops(model, replace(TORCH_OPS, decode_attention=decode_attention, rope_into_cache=rope_into_cache))
    fused = decode(model, PROMPTS, options, wavefront)
    assert (fused.tokens, fused.steps) == (plain.tokens, plain.steps)


def test_captured_iteration_has_the_expected_launches(device):
    """Per block: four norms, rotation into the cache, attention and its reduction, the gate."""
    model = lively_model().float().to(device)
    use_ops(model, choose_ops("triton", torch.device(device)))
    requests = Requests(model, [[1, 2, 3], [4, 5]], Decoding(max_new_tokens=4, num_steps=2))
    token = CapturedToken(model, requests, requests.stopping[0])
    token.place([0, 1], [3, 3])
    with torch.no_grad(), watched() as launches:
        token.iterate(0)
    block = ["norm_forward", "rotate_and_store", "attend_one", "join_splits", "norm_forward", "norm_forward",
             "swiglu_forward", "norm_forward"]  # fmt: skip
    assert [launch.name for launch in launches] == block * len(model.transformer.core_block)
