"""Byte-level BPE by the `tokenizers` library, with the special tokens of Huginn inside the vocabulary."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BEGIN_TEXT = "<|begin_text|>"
THINK_TOKENS = ("<|begin_think|>", "<|end_think|>", "<|begin_answer|>", "<|end_answer|>")
SPECIAL_TOKENS = (
    BEGIN_TEXT,
    "<|end_text|>",
    "<|begin_header|>",
    "<|end_header|>",
    "<|end_turn|>",
    "<|pad|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    *THINK_TOKENS,
    *(f"<|c_{i}|>" for i in range(18)),
)
"""Ids 0 to 31 of every tokenizer trained here: Huginn's, the delimiters of reasoning, and spares."""

_BYTES = 256


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` entries, special tokens included; it can write any text."""
    smallest = len(SPECIAL_TOKENS) + _BYTES
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}; bytes and special tokens alone need {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer.json, or the one in a folder."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; name a tokenizer.json or a folder that holds one")
    return Tokenizer.from_file(str(file))
