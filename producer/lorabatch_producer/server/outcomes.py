"""Waiting for jobs of many requests by one look at the ledger for all of them.

Raises to all that wait what the look raises.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from lorabatch import Result
from lorabatch_producer.waiting import Pauses

__all__ = ["Outcomes"]

LONGEST_PAUSE_S = 0.25


class Outcomes:
    """Used from one event loop."""

    def __init__(self, look: Callable[[Sequence[str]], dict[str, Result]]) -> None:
        self._look = look
        self._waiting: dict[str, asyncio.Future[Result]] = {}
        self._running: asyncio.Task[None] | None = None
        self._came = asyncio.Event()

    async def wait(self, job_id: str, timeout_s: float | None) -> Result | None:
        """The job's result; None if it is still open after `timeout_s`; None waits for ever."""
        future = self._waiting.get(job_id)
        if future is None:
            future = asyncio.get_running_loop().create_future()
            self._waiting[job_id] = future
            future.add_done_callback(lambda _: self._waiting.pop(job_id, None))
        self._came.set()
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        done, _ = await asyncio.wait({future}, timeout=timeout_s)
        return future.result() if done else None

    async def close(self) -> None:
        """Nobody is told any more."""
        for future in list(self._waiting.values()):
            future.cancel()
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def _run(self) -> None:
        pauses = Pauses(LONGEST_PAUSE_S)
        try:
            while self._waiting:
                self._came.clear()
                started_s = time.monotonic()
                try:
                    found = await asyncio.to_thread(self._look, list(self._waiting))
                except Exception as error:  # noqa: BLE001 - it belongs to the requests that wait
                    for future in list(self._waiting.values()):
                        future.set_exception(error)
                    return
                for job_id, result in found.items():
                    if job_id in self._waiting:
                        self._waiting[job_id].set_result(result)
                if found or self._came.is_set():
                    pauses.restart()
                await asyncio.sleep(pauses.after(time.monotonic() - started_s))
        finally:
            self._running = None
