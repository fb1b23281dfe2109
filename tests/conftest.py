"""Fixtures with folders of small chat models, and Ctrl-C for child processes."""

import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import recurrent_depth.hf  # noqa: F401
from recurrent_depth.data.tokenizer import train_tokenizer
from recurrent_depth.hf.loading import fast_tokenizer, wrap
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.transformer import RecurrentDepthModel
from support import ANSWER, QUESTION

TEXT = "the quick brown fox jumps over the lazy dog. how many apples are there? there are 7 apples. "


def pytest_configure():
    """Restore Ctrl-C: the background jobs of a script ignore it, and so would the processes that tests start."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat-model")
    train_tokenizer([TEXT * 20], 320).save(str(folder / "bpe.json"))
    tokenizer = fast_tokenizer(folder / "bpe.json")
    config = ModelConfig(
        n_embd=32, n_heads=1, intermediate_size=64, vocab_size=320, block_size=2048, mean_recurrence=4
    )  # fmt: skip  # heads of size 32, the smallest that vLLM serves on a CPU
    model = RecurrentDepthModel(config)
    model.initialise(seed=0)
    silent = [i for token, i in tokenizer.get_vocab().items() if not token.isascii() or token.startswith("<|")]
    model.transformer.wte.weight.data[silent] = 0  # it writes only letters, which a stream sends at once
    wrap(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gated_folder(chat_folder, tmp_path_factory):
    """The chat model with an exit gate, which stops tokens at different iterations."""
    folder = tmp_path_factory.mktemp("gated-model")
    model = AutoModelForCausalLM.from_pretrained(chat_folder, gate={"input": "state_and_change", "bias": 0.0})
    with torch.no_grad():
        model.transformer.gate.weight.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(chat_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def answering_folder(chat_folder, tmp_path_factory):
    """The chat model fine-tuned to answer QUESTION with ANSWER and to end its turn, saved by transformers."""
    folder = tmp_path_factory.mktemp("answering-model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chat_folder), AutoTokenizer.from_pretrained(chat_folder)
    with torch.no_grad():
        model.transformer.wte.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(ids, labels=ids, num_steps=4).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
