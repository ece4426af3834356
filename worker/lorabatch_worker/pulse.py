"""The engine's pulse: whether it still makes steps, so that a hung device does not look alive.

Everything that tells others "we are on it" asks here first: lease renewals, the visibility
heartbeat and new claims. The limit is generous, STALL_MIN_S at least, because one step of a
large model on a CPU takes seconds. Raises nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from lorabatch_worker.runner import Runner

__all__ = ["STALL_MIN_S", "Pulse"]

STALL_MIN_S = 30.0


class Pulse:
    """`beating` is False once the runner made no progress for max(lease_s, STALL_MIN_S)."""

    def __init__(self, runner: Runner, lease_s: float) -> None:
        self._runner = runner
        self._excused = False
        self._excused_until_s = float("-inf")
        self.limit_s = max(lease_s, STALL_MIN_S)

    @property
    def beating(self) -> bool:
        seen_s = max(self._runner.last_progress_s, self._excused_until_s)
        return self._excused or time.monotonic() - seen_s <= self.limit_s

    @contextmanager
    def excused(self) -> Iterator[None]:
        """The runner waits for the ledger meanwhile, not for its device."""
        self._excused = True
        try:
            yield
        finally:
            self._excused_until_s = time.monotonic()
            self._excused = False
