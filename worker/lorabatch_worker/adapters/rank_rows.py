"""Which rows of the pool of rank rows are whose: each adapter's lie side by side.

Used from the engine's thread alone. Raises nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["NO_ROWS", "RankRows", "Rows", "gaps"]

Rows = range  # of the pool: those that an adapter takes, the same in every layer
NO_ROWS = range(0)


class RankRows:
    """A pool of `count` rows."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._taken: list[Rows] = []  # in order

    def take(self, rank: int) -> Rows | None:
        """The smallest gap that holds so many; None: there is none."""
        if not rank:
            return NO_ROWS
        wide = [gap for gap in gaps(self._taken, self.count) if len(gap) >= rank]
        if not wide:
            return None
        gap = min(wide, key=len)
        rows = range(gap.start, gap.start + rank)
        self._taken = sorted([*self._taken, rows], key=lambda r: r.start)
        return rows

    def give_back(self, rows: Rows) -> None:
        if rows:
            self._taken.remove(rows)


def gaps(taken: Iterable[Rows], count: int) -> list[Rows]:
    """What is between these, which are in order, of `count` rows."""
    found, end = [], 0
    for rows in taken:
        found.append(range(end, rows.start))
        end = rows.stop
    return [*found, range(end, count)]
