"""A small chat model as a folder, as a user would have it."""

import pytest

from recurrent_depth.data.tokenizer import train_tokenizer
from recurrent_depth.hf.loading import _fast_tokenizer, wrap
from recurrent_depth.model.config import ModelConfig
from recurrent_depth.model.transformer import RecurrentDepthModel

TEXT = "the quick brown fox jumps over the lazy dog. how many apples are there? there are 7 apples. "


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat-model")
    train_tokenizer([TEXT * 20], 320).save(str(folder / "bpe.json"))
    tokenizer = _fast_tokenizer(folder / "bpe.json")
    config = ModelConfig(
        n_embd=32, n_heads=2, intermediate_size=64, vocab_size=320, block_size=2048, mean_recurrence=4
    )  # fmt: skip
    model = RecurrentDepthModel(config)
    model.initialise(seed=0)
    silent = [i for token, i in tokenizer.get_vocab().items() if not token.isascii() or token.startswith("<|")]
    model.transformer.wte.weight.data[silent] = 0  # it writes letters, which a stream does not hold back
    wrap(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
