"""The bytes per token from which benchmarks/gpu/decoding.py computes the bandwidth."""

import torch

from benchmarks.gpu.decoding import bytes_of_a_token
from recurrent_depth.generation.cache import cache_bytes
from recurrent_depth.model.config import SHAPES
from recurrent_depth.model.transformer import RecurrentDepthModel


def test_token_bytes_are_all_matrices_and_its_part_of_the_cache():
    config = SHAPES["small"]
    with torch.device("meta"):
        model = RecurrentDepthModel(config)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    core = sum(p.numel() for p in model.transformer.core_block.parameters() if p.ndim == 2) + config.n_embd**2
    once, twice = (bytes_of_a_token(config, 3, 100, steps) for steps in (1, 2))
    assert once["weight_bytes"] == 2 * matrices  # tied embeddings: the embedding is the head
    assert twice["weight_bytes"] - once["weight_bytes"] == 2 * core  # the state's half of the adapter
    assert twice["key_value_bytes"] == cache_bytes(config, 3, 100, 2, dtype=torch.bfloat16)
