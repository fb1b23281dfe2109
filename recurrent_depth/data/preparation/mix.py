"""How often the rows of each source are taken, so that categories have their shares.

A weight is the number of passes over a source relative to the other sources of its category: an encyclopaedia of
weight 4 is read four times as often as a source of weight 1, and a source of weight 0.25 to a quarter. A source's share
of its category is therefore in proportion to weight x size, and to the weight alone among sources of equal size.
What a whole category gets is fixed by its share; rows are counted after packing, so the shares hold for the tokens that
are trained on, whatever a packing policy drops.
"""

from collections.abc import Sequence

import numpy as np

from recurrent_depth.data.config import SourceConfig
from recurrent_depth.data.layout import DataError


def passes(
    sources: Sequence[SourceConfig], rows: Sequence[int], shares: dict[str, float], total: float | None
) -> list[float]:
    """Passes over each source.

    Args:
        sources: of the mix.
        rows: packed rows that each source has.
        shares: of each category, in any unit; empty: every source is read `weight` times.
        total: rows wanted in all; None takes as many as there are without reading any source more often than its weight
            says, or, without shares, exactly as often.

    Returns:
        A factor for each source: 2.5 takes every row twice and half of the rows once more.
    """
    mass: dict[str, float] = {}
    for source, count in zip(sources, rows, strict=True):
        group = source.category if shares else ""
        mass[group] = mass.get(group, 0.0) + source.weight * count
    empty = [group for group in (shares or mass) if not mass.get(group)]
    if empty and (shares or total):
        raise DataError(
            f"no rows for {', '.join(map(repr, empty))}; add text to these categories or take out the share"
        )
    if not shares:
        scale = {"": 1.0 if total is None else total / mass[""]}
    else:
        part = {group: share / sum(shares.values()) for group, share in shares.items()}
        all_rows = min(mass[group] / part[group] for group in part) if total is None else total
        scale = {group: part[group] * all_rows / mass[group] for group in part}
    return [source.weight * scale[source.category if shares else ""] for source in sources]


def row_copies(rows: Sequence[int], factors: Sequence[float], groups: Sequence[str]) -> list[int]:
    """How many rows to take of each part, given its rows, its factor and its category.

    What rounding takes from one part it gives to the next of the category, so each category is right to one row.
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
    """`copies` row numbers of a part, in random order within each pass: no row comes more than one time more often."""
    whole, rest = divmod(copies, rows) if rows else (0, 0)
    runs = [generator.permutation(rows) for _ in range(whole)]
    return np.concatenate([*runs, generator.permutation(rows)[:rest]])


def rows_of_file(
    rows: Sequence[int], copies: Sequence[int], seed: Sequence[int], files: int, file: int
) -> list[tuple[int, np.ndarray]]:
    """What one of `files` output files holds: (part, row numbers in it).

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
