"""How long a group is gathered before it becomes one transaction.

The first waits WAIT_S for company. Groups that follow one another are at least EVERY_S apart: a
steady flow pays for few transactions, and what comes alone is not held up. A worker that holds few
jobs at a time gathers for less long, so that it can end RATE jobs a second all the same. Raises
nothing.
"""

from __future__ import annotations

import time

__all__ = ["GROUP_MAX", "Grouping"]

GROUP_MAX = 256
WAIT_S = 0.005
EVERY_S = 0.25
RATE = 400


class Grouping:
    """The groups of one thread, one after another, of a worker that has up to `in_hand` jobs."""

    def __init__(self, in_hand: int) -> None:
        self._in_hand = in_hand
        self._last_s = self._end_s = float("-inf")

    def begin(self) -> None:
        every_s = min(EVERY_S, self._in_hand / RATE)
        self._end_s = max(time.monotonic() + WAIT_S, self._last_s + every_s)

    def left_s(self) -> float:
        """How long this group may still wait for more."""
        return max(0.0, self._end_s - time.monotonic())

    def end(self) -> None:
        self._last_s = time.monotonic()
