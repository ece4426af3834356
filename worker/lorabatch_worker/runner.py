"""What the queue side asks of an engine, so that either side can be tested without the other.

A runner takes claimed jobs, runs them in micro-batches on a thread of its own, and reports
each job's end exactly once. All methods may be called from any thread. Callbacks may come on any
thread too, the caller's included, and must not block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from lorabatch.ledger import Claim, Outcome
from lorabatch.streams import Piece
from lorabatch_worker.adapters.wanted import Wanted

__all__ = ["Broken", "OnText", "Postpone", "Runner"]

Broken = Callable[[Sequence[str]], None]
OnText = Callable[[Sequence[Piece]], None]
Postpone = Callable[[Sequence[Claim]], None]


class Runner(Protocol):
    """A continuous-batching engine as the pool sees it."""

    @property
    def last_progress_s(self) -> float:
        """`time.monotonic()` of the last completed step, or of the last look at an empty queue."""

    @property
    def load(self) -> dict[str, int]:
        """Counts for people: at least `waiting` and `running` jobs; with `steps` so far goes
        `step_seqs`, the sequences in them, summed up."""

    def start(
        self,
        on_started: Callable[[Sequence[str]], None],
        on_finished: Callable[[Sequence[Outcome]], None],
        on_postponed: Postpone | None = None,
        on_broken: Broken = lambda _: None,
        on_text: OnText = lambda _: None,
    ) -> None:
        """Begin. `on_started` gets ids of jobs that entered the running batch, `on_finished`
        the outcome of every job that ended, bad ones included. Before a suspect runs, and before
        anything runs after one, `on_started` waits until the ledger knows. `on_postponed` gets jobs
        that the runner gives up for now, to come again later: their adapter is being fetched, and
        others could not be taken for them. None: it keeps all. `on_broken`: the runner can run
        nothing more, only a new process can; it gets the ids of the jobs that may be why. Neither
        they nor any other job that has not ended will. `on_text` gets texts as they grow, of jobs
        with `stream`, on a thread that it may hold up."""

    def submit(self, claims: Sequence[Claim]) -> None:
        """Run these jobs. A job that cannot run ends as a failed outcome, never as an error."""

    def abort(self, job_id: str, reason: str) -> None:
        """End a job at the next step as cancelled (`reason` "cancelled") or failed (other codes).
        Unknown ids are ignored: the job may just have ended."""

    def drop(self, job_ids: Sequence[str]) -> None:
        """Forget jobs without an outcome: their lease was lost to another worker."""

    def warm(self, wanted: Wanted) -> str:
        """Begin to load an adapter ahead of its jobs, if that has not been done: "loaded",
        "loading", or why it cannot be."""

    def place(self, wanted: Wanted) -> str:
        """Where an adapter is by now: "device", "memory", "disk" (fetched before) or "nowhere".
        Loads nothing and waits for nothing."""

    def drain(self, timeout_s: float) -> list[Claim]:
        """Admit nothing more, let running jobs end for at most `timeout_s`, stop the thread.
        Returns the claims that did not end; their outcomes will not be reported."""
