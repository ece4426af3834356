"""Waiting for jobs to end, by looking at the ledger with a gentle back-off.

`Watch` makes one look at a time, so that the blocking and the awaitable client share it.
`Pauses` grow from 20 ms to 1 s while nothing ends. They are at least as long as 100 looks, up to
1 s, and never shorter than one look: who waits for many jobs must not take the processor from the
worker that runs them.
Raises JobNotFound, WaitTimeout, and for a single job JobFailed and JobCancelled.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from lorabatch import Ledger, Result
from lorabatch.errors import JobCancelled, JobFailed, JobNotFound, WaitTimeout

__all__ = ["LAST_PAUSE_S", "Pauses", "Watch", "succeeded"]

FIRST_PAUSE_S = 0.02
LAST_PAUSE_S = 1.0
GROWTH = 1.5
LOOKS_PER_PAUSE = 100
LOOK_IDS = 5000
"""Of very many jobs a look is made in parts, so that no more results are held than these."""


class Pauses:
    """How long to wait from one look to the next."""

    def __init__(
        self, longest_s: float = LAST_PAUSE_S, looks_per_pause: int = LOOKS_PER_PAUSE
    ) -> None:
        self._longest_s = longest_s
        self._looks_per_pause = looks_per_pause
        self.restart()

    def restart(self) -> None:
        """Begin anew with the shortest: something has just ended."""
        self._next_s = min(FIRST_PAUSE_S, self._longest_s)

    def after(self, took_s: float) -> float:
        """Seconds to wait after a look that took so long."""
        rest = min(took_s * self._looks_per_pause, LAST_PAUSE_S)
        pause = max(self._next_s, took_s, rest)
        self._next_s = min(self._next_s * GROWTH, self._longest_s)
        return pause


class Watch:
    """Some jobs, those of them still open, and when to give up."""

    def __init__(self, ledger: Ledger, job_ids: Iterable[str], timeout_s: float | None) -> None:
        self._ledger = ledger
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._open = dict.fromkeys(job_ids)
        self._known = not self._open
        self._left: list[str] = []  # of the look that is under way
        self._found_any = False
        self._pauses = Pauses()
        self._took_s = 0.0

    @property
    def over(self) -> bool:
        return not self._open

    @property
    def open(self) -> int:
        return len(self._open)

    def add(self, job_ids: Iterable[str]) -> None:
        """Watch these too, which are in the ledger."""
        self._open.update(dict.fromkeys(job_ids))

    def look(self) -> list[Result]:
        """Results of the jobs that have ended since the last look, or of a part of very many.

        Raises JobNotFound for an unknown id and WaitTimeout when time is up.
        """
        started = time.monotonic()
        if not self._left:
            self._left, self._found_any, self._took_s = list(self._open), False, 0.0
        some, self._left = self._left[:LOOK_IDS], self._left[LOOK_IDS:]
        if not self._known:
            self._check_known(some)
            self._known = not self._left
        found = self._ledger.results(some)
        for job_id in found:
            del self._open[job_id]
        self._found_any = self._found_any or bool(found)
        self._took_s += time.monotonic() - started
        if self._found_any:
            self._pauses.restart()
        elif self._late and not self._left and self._timeout_s is not None:
            raise self.timeout(self._timeout_s)
        return [found[job_id] for job_id in some if job_id in found]

    @property
    def _late(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _check_known(self, job_ids: Sequence[str]) -> None:
        states = self._ledger.states(job_ids)
        for job_id in job_ids:
            if job_id not in states:
                raise JobNotFound(f"job {job_id!r}: no such job in this ledger")

    def pause_s(self) -> float:
        """Seconds until the next look."""
        if self._left:
            return 0.0
        pause = self._pauses.after(self._took_s)
        if self._deadline is not None:
            pause = min(pause, max(0.0, self._deadline - time.monotonic()))
        return pause

    def timeout(self, after_s: float) -> WaitTimeout:
        """The error that says what is open."""
        job_id = next(iter(self._open))
        state = self._ledger.states([job_id]).get(job_id, "unknown")
        who = f"job {job_id!r} is {state}"
        if len(self._open) > 1:
            who = f"{len(self._open)} jobs are open, the first {job_id!r} ({state})"
        return WaitTimeout(
            f"{who} after {after_s:g} s; nothing was cancelled: wait longer or ask again "
            "later, and check that a worker runs"
        )


def succeeded(result: Result) -> Result:
    """The same result, if its job succeeded. Raises JobFailed or JobCancelled."""
    if result.state == "cancelled":
        raise JobCancelled(f"job {result.job_id!r} was cancelled")
    if result.state == "failed":
        error = result.error
        reason = f"{error.code}: {error.message}" if error else "no reason was recorded"
        raise JobFailed(f"job {result.job_id!r} failed: {reason}")
    return result
