"""The engine's pulse: whether it still makes steps, so that a hung device does not look alive.

Everything that tells others "we are on it" asks here first: lease renewals, the visibility
heartbeat and new claims. The limit is generous, STALL_MIN_S at least, because one step of a
large model on a CPU takes seconds. Raises nothing.
"""

from __future__ import annotations

import time

from lorabatch_worker.runner import Runner

__all__ = ["STALL_MIN_S", "Pulse"]

STALL_MIN_S = 30.0


class Pulse:
    """`beating` is False once the runner made no progress for max(lease_s, STALL_MIN_S)."""

    def __init__(self, runner: Runner, lease_s: float) -> None:
        self._runner = runner
        self.limit_s = max(lease_s, STALL_MIN_S)

    @property
    def beating(self) -> bool:
        return time.monotonic() - self._runner.last_progress_s <= self.limit_s
