"""How often the rows of each source are taken, so that categories have their shares.

A weight is the number of passes over a source relative to the other sources of its category: an encyclopaedia of
weight 4 is read four times as often as a source of weight 1, and a source of weight 0.25 to a quarter. A source's share
of its category is therefore proportional to weight x size, and to the weight alone among sources of equal size. The
share of a whole category is fixed. Rows are counted after packing, so the shares hold for the tokens that are trained
on, independent of what a packing policy drops.
"""

from collections.abc import Sequence

import numpy as np

from recurrent_depth.data.config import SourceConfig
from recurrent_depth.data.layout import DataError


def passes(
    sources: Sequence[SourceConfig], rows: Sequence[int], shares: dict[str, float], total: float | None
) -> list[float]:
    """Return the passes over each source: 2.5 takes every row twice and half of the rows once more.

    Args:
        sources: of the mix.
        rows: packed rows of each source.
        shares: of each category, in any unit; empty: every source is read `weight` times.
        total: rows wanted in all. None takes as many as there are without reading any source more often than its weight
            says, or, without shares, exactly as often.

    Raises:
        DataError: if a category has no rows.
    """
    groups = [source.category if shares else "" for source in sources]
    mass = dict.fromkeys(shares or groups, 0.0)
    for group, source, count in zip(groups, sources, rows, strict=True):
        mass[group] += source.weight * count
    empty = [group for group in mass if not mass[group]]
    if empty and (shares or total):
        raise DataError(f"no rows for {', '.join(map(repr, empty))}; add text to these categories or remove the share")
    if not shares:
        scale = {"": 1.0 if total is None else total / mass[""]}
    else:
        part = {group: share / sum(shares.values()) for group, share in shares.items()}
        all_rows = min(mass[group] / part[group] for group in part) if total is None else total
        scale = {group: part[group] * all_rows / mass[group] for group in part}
    return [source.weight * scale[group] for group, source in zip(groups, sources, strict=True)]


def row_copies(rows: Sequence[int], factors: Sequence[float], groups: Sequence[str]) -> list[int]:
    """Return how many rows to take of each part, given its rows, its factor and its category.

    What rounding takes from one part goes to the next of the category, so each category is right to one row.
    """
    wanted: dict[str, float] = {}
    taken: dict[str, int] = {}
    copies = []
    for count, factor, group in zip(rows, factors, groups, strict=True):
        wanted[group] = wanted.get(group, 0.0) + count * factor
        number = max(round(wanted[group]) - taken.get(group, 0), 0) if count else 0
        taken[group] = taken.get(group, 0) + number
        copies.append(number)
    return copies


def chosen_rows(rows: int, copies: int, generator: np.random.Generator) -> np.ndarray:
    """Return `copies` row numbers of a part, in random order per pass; no row comes two times more than another."""
    whole, rest = divmod(copies, rows) if rows else (0, 0)
    runs = [generator.permutation(rows) for _ in range(whole)]
    return np.concatenate([*runs, generator.permutation(rows)[:rest]])


def rows_of_file(
    rows: Sequence[int], copies: Sequence[int], seed: Sequence[int], files: int, file: int
) -> list[tuple[int, np.ndarray]]:
    """Return the rows of one of `files` output files, as (part, row numbers in it).

    Chosen rows of all parts are dealt to the files in turn, so every file mixes all sources and sizes differ by a row.
    """
    dealt = []
    before = 0
    for part, (count, number) in enumerate(zip(rows, copies, strict=True)):
        if number:
            chosen = chosen_rows(count, number, np.random.default_rng([*seed, part]))
            dealt.append((part, chosen[(file - before) % files :: files]))
        before += number
    return dealt
