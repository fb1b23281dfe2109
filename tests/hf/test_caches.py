"""PreallocatedLayer against the DynamicLayer of transformers."""

import random

import pytest
import torch
from transformers import DynamicLayer

from recurrent_depth.hf.caches import PreallocatedLayer


@pytest.mark.parametrize("seed", range(8))
def test_preallocated_layer_equals_a_dynamic_layer(seed):
    choose, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    plain, preallocated = DynamicLayer(), PreallocatedLayer(capacity=choose.choice([0, 4, 100]))
    batch = 2
    for _ in range(30):
        action = choose.choice(["append", "append", "append", "crop", "reorder", "select"])
        if action == "append" or not plain.is_initialized or not plain.get_seq_length():
            entries = torch.randn(2, batch, 3, choose.randint(1, 4), 6, generator=noise)
            with torch.inference_mode(choose.random() < 0.3):
                kept = [layer.update(entries[0], entries[1]) for layer in (plain, preallocated)]
            assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
        elif action == "crop" and plain.get_seq_length() > 1:
            for layer in (plain, preallocated):
                layer.crop(-1)
        elif action == "reorder":
            order = torch.tensor([choose.randrange(batch) for _ in range(batch)])
            for layer in (plain, preallocated):
                layer.reorder_cache(order)
        elif action == "select":
            batch = choose.choice([1, 2, 3])
            rows = torch.tensor([choose.randrange(len(plain.keys)) for _ in range(batch)])
            for layer in (plain, preallocated):
                layer.batch_select_indices(rows)
        assert plain.get_seq_length() == preallocated.get_seq_length()
    if plain.get_seq_length():
        assert torch.equal(plain.keys, preallocated.keys)
        assert torch.equal(plain.values, preallocated.values)


def test_preallocated_layer_does_not_write_in_place_with_gradients():
    layer = PreallocatedLayer(8)
    first, second = (torch.randn(2, 1, 1, 2, 4, requires_grad=True) for _ in range(2))
    layer.update(first[0], first[1])
    keys, _ = layer.update(second[0], second[1])
    keys.square().sum().backward()
    torch.testing.assert_close(first.grad[0], 2 * first.detach()[0])
