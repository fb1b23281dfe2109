"""From documents to rows of equal length. Pure functions: the same on a laptop and on a cluster."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from recurrent_depth.data.config import Policy


@dataclass(frozen=True)
class Row:
    """`length` token ids, and the positions at which documents begin (a continued document begins before the row)."""

    input_ids: np.ndarray
    doc_starts: list[int]


@dataclass
class PackingCounts:
    """What became of the tokens.

    Attributes:
        kept: in rows.
        rests: dropped because their document did not end with its row (policy `huginn`).
        unfilled: dropped because they did not fill a last row.
    """

    kept: int = 0
    rests: int = 0
    unfilled: int = 0

    @property
    def dropped(self) -> int:
        """All that is in no row."""
        return self.rests + self.unfilled


@dataclass
class Packer:
    """Fills rows of `length` tokens.

    Args:
        length: tokens of a row (a training row of T tokens needs T + 1).
        policy: `concat` cuts documents at row ends and continues them in the next row (only the last, unfilled row is
            dropped); `huginn` drops the rest of a document at a row end; `best-fit` keeps some documents
            waiting and puts the longest that fits into the open row; where none fits, the shortest is cut at the row's
            end and goes on in the next row.
    """

    length: int
    policy: Policy = "concat"
    counts: PackingCounts = field(default_factory=PackingCounts)
    _pieces: list[np.ndarray] = field(default_factory=list)
    _filled: int = 0
    _starts: list[int] = field(default_factory=list)
    _waiting: list[np.ndarray] = field(default_factory=list)

    def add(self, document: ArrayLike) -> Iterator[Row]:
        """Pack the token ids of one document; yields the rows that became full."""
        ids = np.asarray(document)
        if self.policy == "best-fit":
            yield from self._add_best_fit(ids)
        elif len(ids):
            yield from self._place(ids)

    def _place(self, ids: np.ndarray) -> Iterator[Row]:
        """Put a document at the end of the open row, and what does not fit into the next rows."""
        self._starts.append(self._filled)
        while len(ids):
            room = self.length - self._filled
            piece, ids = ids[:room], ids[room:]
            self._pieces.append(piece)
            self._filled += len(piece)
            if self._filled == self.length:
                yield self._take()
                if self.policy == "huginn":
                    self.counts.rests += len(ids)
                    return

    def _take(self) -> Row:
        row = Row(np.concatenate(self._pieces), self._starts)
        self.counts.kept += self.length
        self._pieces, self._filled, self._starts = [], 0, []
        return row

    def _add_best_fit(self, ids: np.ndarray, window: int = 64) -> Iterator[Row]:
        """Keep up to `window` documents waiting; the longest that fits the open row goes next."""
        self._waiting.append(ids)
        if len(self._waiting) >= window:
            yield from self._place_one()

    def _place_one(self) -> Iterator[Row]:
        room = self.length - self._filled
        sizes = [len(ids) for ids in self._waiting]
        fitting = [size for size in sizes if size <= room]
        chosen = self._waiting.pop(sizes.index(max(fitting) if fitting else min(sizes)))
        yield from self._place(chosen)

    def finish(self) -> Iterator[Row]:
        """Place what waits; what does not fill a row is dropped and counted."""
        while self._waiting:
            yield from self._place_one()
        self.counts.unfilled += self._filled
        self._pieces, self._filled, self._starts = [], 0, []


def pack(documents: Iterable[ArrayLike], length: int, policy: Policy = "concat") -> tuple[list[Row], PackingCounts]:
    """All rows of a set of documents, and the counts of tokens kept and dropped."""
    packer = Packer(length, policy)
    rows = [row for document in documents for row in packer.add(document)]
    rows.extend(packer.finish())
    return rows, packer.counts
