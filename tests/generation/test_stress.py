"""Thousands of short random requests through every mode: no memory leaks, and the results stay right."""

import gc
import random

import pytest
import torch

from recurrent_depth.generation.config import Refill, Speculation, Wavefront
from recurrent_depth.generation.exits import OutputKL, StateChange
from recurrent_depth.generation.request import Decoding
from support import decode, lively_model

MODES = {
    "plain": (None, {"exit": OutputKL(0.2)}),
    "speculative": (Speculation(2, 3), {}),
    "wavefront": (Wavefront(2, exact=True), {}),
    "refilled": (Refill(32), {"exit": StateChange(0.6), "cache_budget": 2}),
}


def tensors_alive():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.slow
@pytest.mark.parametrize("name", MODES)
def test_thousands_of_requests_leave_no_memory_behind(name):
    mode, changes = MODES[name]
    model = lively_model(vocab_size=20)
    rng = random.Random(name)
    prompts = [[rng.randrange(20) for _ in range(rng.randint(1, 9))] for _ in range(2048)]
    alive, written = [], []
    for first in range(0, len(prompts), 256):
        options = Decoding(max_new_tokens=6, num_steps=5, temperature=0.8, stop=(3,), **changes)
        names = range(first, first + 256)
        result = decode(model, prompts[first : first + 256], options, mode, requests=names)
        written += result.tokens
        del result
        alive.append(tensors_alive())
    assert len(set(alive)) == 1
    for i in rng.sample(range(len(prompts)), 60):
        assert written[i] == decode(model, [prompts[i]], options, requests=[i]).tokens[0]
