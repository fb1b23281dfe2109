"""The exact wavefront writes what plain decoding writes, in any batch; fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recurrent_depth.generation.decoding import Decoding, decode
from recurrent_depth.generation.wavefront import Wavefront, decode_wavefront
from support import lively_model


@pytest.fixture(scope="module")
def model():
    return lively_model(vocab_size=20)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_exact_wavefront_writes_what_plain_decoding_writes(model, data):
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4), "lengths")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "prompt seed"))
    prompts = [torch.randint(20, (n,), generator=generator).tolist() for n in lengths]
    options = Decoding(
        max_new_tokens=data.draw(st.integers(1, 20), "new"),
        num_steps=data.draw(st.integers(1, 7), "steps"),
        temperature=data.draw(st.sampled_from([0.0, 0.7, 1.5]), "temperature"),
        top_k=data.draw(st.sampled_from([None, 5]), "top k"),
        stop=data.draw(st.sampled_from([(), (3, 4)]), "stop"),
        seed=data.draw(st.integers(0, 9), "seed"),
    )
    wavefront = Wavefront(
        steps=data.draw(st.integers(1, 4), "steps a pass"), width=data.draw(st.integers(1, 6), "width"), exact=True
    )
    found = decode_wavefront(model, prompts, options, wavefront)
    plain = decode(model, prompts, options)
    assert found.tokens == plain.tokens
    assert found.steps == plain.steps
    assert 0 <= found.accepted <= found.drafted
    assert found.core_steps >= plain.core_steps
