"""Byte-level BPE by the `tokenizers` library, with the special tokens of Huginn inside the vocabulary."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from recurrent_depth.checks import check_at_least
from recurrent_depth.data.chat import BEGIN_HEADER, BEGIN_TEXT, END_HEADER, END_TURN, THINK_TOKENS
from recurrent_depth.data.config import SMALLEST_VOCABULARY
from recurrent_depth.data.layout import TOKENIZER, DataError

SPECIAL_TOKENS = (
    BEGIN_TEXT,
    "<|end_text|>",
    BEGIN_HEADER,
    END_HEADER,
    END_TURN,
    "<|pad|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    *THINK_TOKENS,
    *(f"<|c_{i}|>" for i in range(18)),
)
"""Ids 0 to 31 of every tokenizer trained here: Huginn's, the delimiters of reasoning, and spares."""

LONGEST_WORD = 1000
"""Characters of a word that BPE is trained on; training time grows with the square of it."""

_LETTERS = bytes(ord("a") if byte >= 128 or chr(byte).isalnum() else ord(" ") for byte in range(256))
_OTHERS = bytes(ord("a") if byte < 128 and chr(byte).isalnum() else ord(" ") for byte in range(256))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of `vocab_size` entries, special tokens included. It can encode any text."""
    check_at_least("vocab_size", vocab_size, SMALLEST_VOCABULARY)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_without_long_words(texts), trainer)
    return tokenizer


def _without_long_words(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts, those with a word of more than `LONGEST_WORD` characters in pieces that cut this word."""
    kinds = (r"\p{L}", r"\p{N}", r"\s", r"[^\s\p{L}\p{N}]")  # a word of ByteLevel is a run of one of these
    splitter = pre_tokenizers.Split(Regex("|".join(f"{kind}{{{LONGEST_WORD}}}" for kind in kinds)), "isolated")
    for text in texts:
        if _may_have_long_word(text):
            yield from (piece for piece, _ in splitter.pre_tokenize_str(text))
        else:
            yield text


def _may_have_long_word(text: str) -> bool:
    """Return False if no word is too long. Much cheaper than running the splitter on every text."""
    content = text.encode(errors="replace")
    return b"a" * LONGEST_WORD in content.translate(_LETTERS) or b" " * LONGEST_WORD in content.translate(_OTHERS)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json, or of the folder that holds one.

    Raises:
        FileNotFoundError: if there is no such file.
        DataError: if the file is not a tokenizer.
    """
    path = Path(path)
    file = path / TOKENIZER if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; name a tokenizer.json or a folder that holds one")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise DataError(
            f"{file} is not a tokenizer ({error}); give a tokenizer.json of the `tokenizers` library"
        ) from error
