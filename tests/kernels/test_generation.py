"""Decoding that reads the cache by the kernels, against decoding that copies it."""

from dataclasses import replace

import pytest
import torch

from recurrent_depth.generation.decoding import Decoding, decode
from recurrent_depth.generation.exits import StateChange
from recurrent_depth.generation.graph import decode_captured
from recurrent_depth.model.ops import TORCH_OPS, choose_ops, use_ops
from recurrent_depth_kernels import decode_attention, rope_into_cache
from recurrent_depth_kernels.launch import watched
from support import lively_model

PROMPTS = [[5, 6, 7], [11]]
OPTIONS = Decoding(max_new_tokens=3, num_steps=4, exit=StateChange(0.6), cache_budget=2)
FULL = replace(OPTIONS, cache_budget=None)


@pytest.mark.parametrize(("options", "way"), [(OPTIONS, decode), (OPTIONS, decode_captured), (FULL, decode_captured)])
def test_tokens_and_depths_are_equal_in_fp64(options, way):
    model = lively_model()
    plain = decode(model, PROMPTS, options)
    assert len({steps for row in plain.steps for steps in row[1:]}) > 1
    use_ops(model, replace(TORCH_OPS, decode_attention=decode_attention, rope_into_cache=rope_into_cache))
    with watched() as launches:
        fused = way(model, PROMPTS, options)
    assert (fused.tokens, fused.steps) == (plain.tokens, plain.steps)
    kernels = {launch.name for launch in launches}
    assert "attend_one" in kernels
    assert ("rotate_and_store" in kernels) == (way is decode_captured)


def test_a_captured_step_takes_these_launches(device):
    """With all kernels: per block four norms, rotation into the cache, attention and its reduction, the gate."""
    from recurrent_depth.generation.cache import RecurrentCache
    from recurrent_depth.generation.graph import StaticToken

    model = lively_model().float().to(device)
    use_ops(model, choose_ops("triton", torch.device(device)))
    cache = RecurrentCache(model.config, 2, 8, num_steps=2, device=device)
    token = StaticToken(model, cache, torch.ones(2, 3, dtype=torch.long, device=device), None, 2, 1, False)
    with torch.no_grad(), watched() as launches:
        token.step(0)
    block = ["norm_forward", "rotate_and_store", "attend_one", "join_splits", "norm_forward", "norm_forward",
             "swiglu_forward", "norm_forward"]  # fmt: skip
    assert [launch.name for launch in launches] == block * len(model.transformer.core_block)
