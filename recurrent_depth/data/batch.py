"""What the trainer reads: batches, and the protocol of everything that gives them.

A source has no state. Row numbers run through an endless, seeded order; row n is the same for every caller, so ranks
only divide row numbers among themselves and a resumed run needs nothing but its step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens.

    Attributes:
        input_ids: [B, T] int64.
        targets: [B, T] int64, aligned: the target of position t; -100 where there is none.
        document_ids: [B, T], equal where two tokens share a document; None without document masking.
        position_ids: [B, T] if positions restart with every document, else None.
    """

    input_ids: Tensor
    targets: Tensor
    document_ids: Tensor | None = None
    position_ids: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the same batch on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return Batch(**moved)


class Source(Protocol):
    """Everything the trainer needs of data.

    Attributes:
        name: what a user calls the data.
        vocab_size: token ids are below it.
        sequence_length: T of the longest row.
        rows_per_epoch: after these, rows come again in another order; None for generated rows, which never end.
    """

    name: str
    vocab_size: int
    sequence_length: int

    @property
    def rows_per_epoch(self) -> int | None: ...

    def fingerprint(self) -> str:
        """Return a string that changes when the data change."""

    def tokenizer_json(self) -> str | None:
        """Return the content of a tokenizer.json that belongs to the token ids, if there is one."""

    def batch(self, first_row: int, count: int, step: int) -> Batch:
        """Return rows [first_row, first_row + count) of the seeded order; `step` moves a curriculum."""
