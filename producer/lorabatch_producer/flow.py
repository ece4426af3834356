"""One call's jobs, from a source of any length: accepted while there is room, watched until they
end.

`Flow` takes one turn at a time, so that the blocking and the awaitable client share it. It holds at
most `max_in_flight` jobs, however many there are. What the source raises, and a job of it that is
refused, ends the flow once all jobs before it are accepted, and their results given where these
were asked for; each error has a note of how many that were.
Raises SettingsError, InvalidJob, IdempotencyConflict, WaitTimeout, QueueFull, and what the source
raises; database errors pass through.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, repeat
from typing import Any, Literal, NamedTuple

from lorabatch import Job, Ledger, Result
from lorabatch.errors import IdempotencyConflict, QueueFull, SettingsError
from lorabatch_producer.fields import make_job
from lorabatch_producer.sending import CHUNK, Sender
from lorabatch_producer.waiting import Watch

__all__ = [
    "IN_FLIGHT",
    "Flow",
    "Gives",
    "Jobs",
    "OnAccepted",
    "Source",
    "Turn",
    "note_accepted",
    "turns",
]

IN_FLIGHT = 1000
LINGER_S = 0.1
"""What a slow source has given is not kept waiting for a full chunk."""

Jobs = Iterable[Job | Mapping[str, Any]]
Gives = Literal["ids", "results", "in order"]
OnAccepted = Callable[[Sequence[str]], object]


class Turn(NamedTuple):
    """What came of one turn: ids of jobs that it accepted, and results that are due."""

    ids: list[str]
    results: list[Result]


class Flow:
    """`gives`: results as they come or in the order of the source, or only ids, which waits for
    no end but to have room. `idle_timeout_s`: how long nothing may be accepted and nothing end."""

    def __init__(
        self,
        sender: Sender,
        ledger: Ledger,
        gives: Gives,
        max_in_flight: int,
        idle_timeout_s: float | None,
        on_accepted: OnAccepted | None,
    ) -> None:
        if max_in_flight < 1:
            raise SettingsError(f"max_in_flight {max_in_flight}: wanted at least 1")
        self._sender, self._gives, self._most = sender, gives, max_in_flight
        self._idle_timeout_s, self._on_accepted = idle_timeout_s, on_accepted
        self._watch = Watch(ledger, (), None)
        self._backlog: list[Job] = []
        self._source_over = False
        self._error: BaseException | None = None
        self._full: QueueFull | None = None
        self._held = Counter[str]()  # jobs accepted and not given; a key may come twice
        self._order = deque[str]()
        self._ended: dict[str, Result] = {}
        self._accepted, self._last = 0, list[str]()
        self._moved_s = time.monotonic()
        self._moved = True

    # -- from the source -------------------------------------------------------

    @property
    def wants(self) -> int:
        """How many jobs there is room for now."""
        if self._source_over or self._backlog:
            return 0
        return min(CHUNK, self._most - self._held.total())

    def take(self, jobs: Iterable[Job]) -> None:
        self._backlog.extend(jobs)

    def end(self, error: BaseException | None = None) -> None:
        """There are no more. `error`: why; raised when all that came before has had its turn."""
        self._source_over, self._error = True, error

    # -- turns -----------------------------------------------------------------

    @property
    def over(self) -> bool:
        """Whether nothing is left to do. Raises what the source did."""
        waits = self._held if self._gives != "ids" else None
        if not self._source_over or self._backlog or waits:
            return False
        if self._error is not None:
            raise self._error
        return True

    def turn(self) -> Turn:
        """Accept what was taken, as much as may wait, and look at what has ended."""
        ids = self._accept() if self._backlog else []
        ended = self._watch.look() if self._waits and self._watch.open else []
        self._moved = bool(ids or ended)
        if self._moved:
            self._moved_s = time.monotonic()
        else:
            self._check_idle()
        return Turn(ids, self._in_order(ended) if self._gives == "in order" else self._due(ended))

    @property
    def _waits(self) -> bool:
        """Whether it matters that jobs end: for their results, or to have room."""
        return self._gives != "ids" or self._held.total() >= self._most

    def pause_s(self) -> float | None:
        """Seconds until the next turn; None: there is nothing to do until the source gives more."""
        if self._moved:
            return 0.0
        waits = self._backlog or (self._held and self._waits)
        return self._watch.pause_s() if waits else None

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """What is raised inside says what was accepted before."""
        try:
            yield
        except Exception as error:
            note_accepted(error, self._last, self._accepted)
            raise

    # -- inside ----------------------------------------------------------------

    def _accept(self) -> list[str]:
        size = len(self._backlog)
        while True:
            try:
                ids = self._sender.chunk(self._backlog[:size])
            except (QueueFull, IdempotencyConflict) as error:
                if size > 1:  # those before it are accepted
                    size //= 2
                    continue
                if isinstance(error, QueueFull):
                    self._full = error
                else:
                    self._backlog.clear()
                    self.end(error)
                return []
            break
        self._sender.forget()  # the workers send what the broker did not take
        self._full = None
        del self._backlog[:size]
        self._accepted, self._last = self._accepted + len(ids), ids[-1:]
        if self._on_accepted is not None:
            self._on_accepted(ids)
        self._held.update(ids)
        self._watch.add(ids)
        if self._gives == "in order":
            self._order.extend(ids)
        return ids

    def _due(self, ended: Sequence[Result]) -> list[Result]:
        """One for each time that its job was asked for."""
        return [one for found in ended for one in repeat(found, self._held.pop(found.job_id))]

    def _in_order(self, ended: Sequence[Result]) -> list[Result]:
        self._ended.update((one.job_id, one) for one in ended if one.job_id in self._held)
        due = []
        while self._order and self._order[0] in self._ended:
            job_id = self._order.popleft()
            due.append(self._ended[job_id])
            self._held[job_id] -= 1
            if not self._held[job_id]:
                del self._held[job_id], self._ended[job_id]
        return due

    def _check_idle(self) -> None:
        limit_s = self._idle_timeout_s
        if limit_s is None or time.monotonic() - self._moved_s < limit_s:
            return
        if self._full is not None:
            raise self._full
        if self._waits and self._watch.open:
            raise self._watch.timeout(limit_s)


class Source:
    """Jobs of an iterable, read no further than there is room for."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = iter(jobs)

    def feed(self, flow: Flow) -> None:
        """Read what the flow wants; less where the source takes its time."""
        some: list[Job] = []
        most, end_s = flow.wants, time.monotonic() + LINGER_S
        try:
            for job in islice(self._jobs, most):
                some.append(make_job(job))
                if time.monotonic() > end_s:
                    break
            else:
                if len(some) < most:
                    flow.end()
        except Exception as error:  # noqa: BLE001 - raised by the flow, after what came before it
            flow.end(error)
        flow.take(some)


def turns(jobs: Jobs, flow: Flow) -> Iterator[Turn]:
    """Until all jobs are accepted and, if the flow gives results, have ended."""
    source = Source(jobs)
    with flow.telling():
        while not flow.over:
            if flow.wants:
                source.feed(flow)
            else:
                time.sleep(flow.pause_s() or 0.0)
            yield flow.turn()


def note_accepted(error: Exception, job_ids: Sequence[str], count: int | None = None) -> None:
    """Add to an error what a call had accepted before it; `count`: how many, if not all ids are
    there any more."""
    count = len(job_ids) if count is None else count
    error.add_note(
        f"the first {count} jobs of this call are accepted and stay so, up to job {job_ids[-1]!r}"
        if count
        else "no job of this call was accepted"
    )
