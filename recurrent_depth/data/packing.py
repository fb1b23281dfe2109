"""From documents to rows of equal length. Pure functions: the same on a laptop and on a cluster."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

Policy = Literal["concat", "best-fit", "huginn"]


@dataclass(frozen=True)
class Row:
    """`length` token ids, and the positions at which documents begin (a continued document begins before the row)."""

    input_ids: list[int]
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
    _ids: list[int] = field(default_factory=list)
    _starts: list[int] = field(default_factory=list)
    _waiting: list[list[int]] = field(default_factory=list)

    def add(self, document: list[int]) -> Iterator[Row]:
        """Pack one document; yields the rows that became full."""
        if self.policy == "best-fit":
            yield from self._add_best_fit(document)
            return
        rest = document
        first = True
        while rest:
            if first:
                self._starts.append(len(self._ids))
            room = self.length - len(self._ids)
            self._ids.extend(rest[:room])
            rest, first = rest[room:], False
            if len(self._ids) == self.length:
                yield self._take()
                if self.policy == "huginn":
                    self.counts.rests += len(rest)
                    return

    def _take(self) -> Row:
        row = Row(self._ids, self._starts)
        self.counts.kept += self.length
        self._ids, self._starts = [], []
        return row

    def _add_best_fit(self, document: list[int], window: int = 64) -> Iterator[Row]:
        """Keep up to `window` documents waiting; the longest that fits the open row goes next."""
        self._waiting.append(document)
        if len(self._waiting) >= window:
            yield from self._place_one()

    def _place_one(self) -> Iterator[Row]:
        room = self.length - len(self._ids)
        fitting = [d for d in self._waiting if len(d) <= room]
        chosen = max(fitting, key=len) if fitting else min(self._waiting, key=len)
        self._waiting.remove(chosen)
        self._starts.append(len(self._ids))
        while chosen:
            room = self.length - len(self._ids)
            self._ids.extend(chosen[:room])
            chosen = chosen[room:]
            if len(self._ids) == self.length:
                yield self._take()

    def finish(self) -> Iterator[Row]:
        """Place what waits; what does not fill a row is dropped and counted."""
        while self._waiting:
            yield from self._place_one()
        self.counts.unfilled += len(self._ids)
        self._ids, self._starts = [], []


def pack(documents: Iterable[list[int]], length: int, policy: Policy = "concat") -> tuple[list[Row], PackingCounts]:
    """All rows of a set of documents, and the counts of tokens kept and dropped."""
    packer = Packer(length, policy)
    rows = [row for document in documents for row in packer.add(document)]
    rows.extend(packer.finish())
    return rows, packer.counts
