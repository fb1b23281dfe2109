"""Attention masks for padding and documents, and the losses, in fp64."""

import pytest
import torch

from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.loss import linear_cross_entropy, shift_labels
from recurrent_depth.model.transformer import RecurrentDepthModel

CONFIG = ModelConfig(n_embd=32, n_heads=2, intermediate_size=48, vocab_size=50)


@pytest.fixture(scope="module")
def model():
    model = RecurrentDepthModel(CONFIG).double()
    model.initialise(1)
    return model


PROMPTS = [[1, 2, 3, 4, 5, 6], [7, 8, 9], [10]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_row_equals_the_row_alone(model, side):
    ids, mask = [], []
    for prompt in PROMPTS:
        pad = [0] * (6 - len(prompt))
        ids.append(pad + prompt if side == "left" else prompt + pad)
        mask.append([0 for _ in pad] + [1] * len(prompt) if side == "left" else [1] * len(prompt) + [0 for _ in pad])
    logits = model(torch.tensor(ids), attention_mask=torch.tensor(mask), num_steps=3).logits
    assert torch.isfinite(logits).all()
    for row, prompt in enumerate(PROMPTS):
        alone = model(torch.tensor([prompt]), num_steps=3).logits[0]
        real = logits[row][torch.tensor(mask[row]).bool()]
        torch.testing.assert_close(real, alone, rtol=1e-10, atol=1e-10)


def test_packed_documents_equal_separate_ones(model):
    documents = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]
    packed = torch.tensor([[token for document in documents for token in document]])
    document_ids = torch.tensor([[0] * 4 + [1] * 2 + [2] * 3])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])

    def gradient(loss):
        model.zero_grad()
        loss.backward()
        return model.transformer.wte.weight.grad.clone()

    together = model(packed, document_ids=document_ids, position_ids=positions, targets=packed, num_steps=(1, 2))
    alone = [model(torch.tensor([d]), targets=torch.tensor([d]), num_steps=(1, 2)) for d in documents]
    torch.testing.assert_close(together.state, torch.cat([a.state for a in alone], dim=1), rtol=1e-10, atol=1e-10)
    total = sum(a.loss for a in alone)
    torch.testing.assert_close(together.loss, total, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient(together.loss), gradient(total), rtol=1e-9, atol=1e-11)


def test_attention_is_causal(model):
    ids = torch.randint(0, 50, (1, 12))
    changed = ids.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 50
    a, b = model(ids, num_steps=4).logits, model(changed, num_steps=4).logits
    assert torch.equal(a[:, :7], b[:, :7])
    assert not torch.allclose(a[:, 7:], b[:, 7:])


def test_attention_mask_of_the_wrong_length_is_an_error(model):
    with pytest.raises(ValueError, match="attention_mask covers 5 tokens"):
        model(torch.zeros(1, 6, dtype=torch.int64), attention_mask=torch.tensor([[0, 1, 1, 1, 1]]))


def test_sequence_beyond_block_size_is_an_error(model):
    with pytest.raises(ValueError, match="block_size"):
        model(torch.zeros(1, CONFIG.block_size + 1, dtype=torch.int64))


@pytest.mark.parametrize("chunk", [None, 4, 100])
def test_chunked_loss_equals_the_plain_one(chunk):
    torch.manual_seed(0)
    hidden = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (3, 5))
    targets[0, :2] = -100
    reference = -sum(
        (hidden[b, t] @ weight.T).log_softmax(-1)[targets[b, t]]
        for b in range(3)
        for t in range(5)
        if targets[b, t] != -100
    )
    expected = torch.autograd.grad(reference, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, targets, chunk)
    torch.testing.assert_close(loss, reference, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_chunked_loss_in_bfloat16_is_exact_and_respects_frozen_inputs():
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 30, 16, dtype=torch.bfloat16), torch.randn(400, 16, dtype=torch.bfloat16)
    targets = torch.randint(0, 400, (1, 30))
    whole = linear_cross_entropy(hidden, weight, targets)
    loss = linear_cross_entropy(hidden, weight, targets, 7)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
    assert not loss.requires_grad
    weight.requires_grad_()  # frozen hidden states
    (3 * linear_cross_entropy(hidden, weight, targets, 7)).backward()
    wide = weight.detach().double().requires_grad_()
    (3 * linear_cross_entropy(hidden.double(), wide, targets)).backward()
    assert (weight.grad - wide.grad).abs().max() < 0.02 * wide.grad.abs().max()


def test_labels_are_shifted_by_one():
    assert shift_labels(torch.tensor([[4, 5, -100, 7]])).tolist() == [[5, -100, 7, -100]]
