"""Names of the files in prepared data, and the errors of data that cannot be used. Imports nothing heavy."""

from typing import Literal

from recurrent_depth.errors import UserError

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
Split = Literal["train", "validation"]


class DataError(UserError, ValueError):
    """Data that cannot be prepared or trained on; the message names the file and what to do."""


class ResumableError(DataError):
    """An outside cause stopped the work (a lost connection, a killed process): the same command continues it."""
