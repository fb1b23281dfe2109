"""Names that prepared data share, and the error of data that cannot be used. Imports nothing heavy."""

from typing import Literal

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
Split = Literal["train", "validation"]


class DataError(ValueError):
    """Data that cannot be prepared or trained on; the message names the file and what to do."""
