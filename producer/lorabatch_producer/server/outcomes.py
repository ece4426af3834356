"""Waiting for jobs of many requests by one look at the ledger for all of them.

Raises, to all that wait, what the look raises.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence

import sqlalchemy as sa
import structlog

from lorabatch import Result
from lorabatch.errors import ServerStops
from lorabatch_producer.waiting import Pauses

__all__ = ["Outcomes"]

log = structlog.get_logger(__name__)

LONGEST_PAUSE_S = 0.1  # who waits alone for a job of a second hears 68 ms late on average, not 112
REST_S = 1.0
LOOKS_PER_PAUSE = 20


class Outcomes:
    """Used from one event loop."""

    def __init__(self, look: Callable[[Sequence[str]], dict[str, Result]]) -> None:
        self._look = look
        self._awaited: dict[str, asyncio.Future[Result]] = {}
        self._waiters = Counter[str]()
        self._running: asyncio.Task[None] | None = None
        self._came = False
        self._stopped = False

    @property
    def waiters(self) -> int:
        """How many wait now."""
        return self._waiters.total()

    async def wait(self, job_id: str, timeout_s: float | None) -> Result | None:
        """The job's result; None if it is still open after `timeout_s`; None waits for ever.
        Raises ServerStops."""
        if self._stopped:
            raise _stops(job_id)
        if job_id not in self._awaited:
            self._awaited[job_id] = asyncio.get_running_loop().create_future()
        future = self._awaited[job_id]
        self._waiters[job_id] += 1
        self._came = True
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        try:
            done, _ = await asyncio.wait({future}, timeout=timeout_s)
            return future.result() if done else None
        finally:
            self._waiters[job_id] -= 1
            if not self._waiters[job_id]:
                del self._waiters[job_id]
                self._awaited.pop(job_id, None)

    def stop(self) -> None:
        """Whoever waits, now or later, is told that it has to ask another server."""
        self._stopped = True
        for job_id in list(self._awaited):
            self._awaited.pop(job_id).set_exception(_stops(job_id))

    async def close(self) -> None:
        """Whoever still waits is cancelled."""
        for future in list(self._awaited.values()):
            future.cancel()
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def _run(self) -> None:
        pauses = Pauses(LONGEST_PAUSE_S, LOOKS_PER_PAUSE)
        try:
            while self._awaited:
                self._came = False
                started_s = time.monotonic()
                try:
                    found = await asyncio.to_thread(self._look, list(self._awaited))
                except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:  # it may be back soon
                    log.warning("outcomes not read", error=type(error).__name__)
                    await asyncio.sleep(REST_S)
                    continue
                except Exception as error:  # noqa: BLE001 - it belongs to the requests that wait
                    for job_id in list(self._awaited):
                        self._awaited.pop(job_id).set_exception(error)
                    return
                for job_id, result in found.items():
                    if job_id in self._awaited:
                        self._awaited.pop(job_id).set_result(result)
                if found or self._came:
                    pauses.restart()
                await asyncio.sleep(pauses.after(time.monotonic() - started_s))
        finally:
            self._running = None


def _stops(job_id: str) -> ServerStops:
    return ServerStops(
        f"job {job_id!r}: this server stops and the job goes on; GET /jobs/{job_id}, of the next "
        "server, has its outcome"
    )
