"""From documents to rows of equal length. Pure functions: the same on a laptop and on a cluster."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from recurrent_depth.data.config import Policy

WINDOW = 64
"""Documents that wait for a place with the policy `best-fit`."""


@dataclass(frozen=True)
class Row:
    """`length` token ids, and the positions at which documents begin (a continued document begins before the row)."""

    input_ids: np.ndarray
    doc_starts: list[int]


@dataclass
class Packer:
    """Fills rows of `length` tokens.

    Args:
        length: tokens of a row (a training row of T tokens needs T + 1).
        policy: `concat` cuts documents at row ends and continues them in the next row (only the last, unfilled row is
            dropped). `huginn` drops the rest of a document at a row end. `best-fit` keeps documents waiting and puts
            the longest that fits into the open row; if none fits, the shortest is cut at the row's end and continues in
            the next row.

    Attributes:
        rests: tokens dropped because their document did not end with its row (policy `huginn`).
        unfilled: tokens dropped because they did not fill a last row.
    """

    length: int
    policy: Policy = "concat"
    rests: int = 0
    unfilled: int = 0
    _pieces: list[np.ndarray] = field(default_factory=list)
    _filled: int = 0
    _starts: list[int] = field(default_factory=list)
    _waiting: list[np.ndarray] = field(default_factory=list)

    def add(self, document: ArrayLike) -> Iterator[Row]:
        """Pack the token ids of one document; yield the rows that became full."""
        ids = np.asarray(document)
        if self.policy != "best-fit":
            yield from self._place(ids)
            return
        self._waiting.append(ids)
        if len(self._waiting) >= WINDOW:
            yield from self._place_best()

    def finish(self) -> Iterator[Row]:
        """Place waiting documents; what does not fill a row is dropped and counted."""
        while self._waiting:
            yield from self._place_best()
        self.unfilled += self._filled
        self._pieces, self._filled, self._starts = [], 0, []

    def _place_best(self) -> Iterator[Row]:
        """Place the longest waiting document that fits the open row, or the shortest of all."""
        room = self.length - self._filled
        sizes = [len(ids) for ids in self._waiting]
        fitting = [size for size in sizes if size <= room]
        chosen = self._waiting.pop(sizes.index(max(fitting) if fitting else min(sizes)))
        yield from self._place(chosen)

    def _place(self, ids: np.ndarray) -> Iterator[Row]:
        """Put a document at the end of the open row, and what does not fit into the next rows."""
        if len(ids):
            self._starts.append(self._filled)
        while len(ids):
            room = self.length - self._filled
            piece, ids = ids[:room], ids[room:]
            self._pieces.append(piece)
            self._filled += len(piece)
            if self._filled == self.length:
                yield self._take_row()
                if self.policy == "huginn":
                    self.rests += len(ids)
                    return

    def _take_row(self) -> Row:
        row = Row(np.concatenate(self._pieces), self._starts)
        self._pieces, self._filled, self._starts = [], 0, []
        return row
