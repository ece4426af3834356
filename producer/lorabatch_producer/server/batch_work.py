"""OpenAI batches brought from their file to their output, by whichever servers there are.

Each batch is held by one server at a time; what a server that died had begun goes on when its lease
has run out, with the same lines as the same jobs. Errors that are not the batch's are logged, and
it is tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from types import TracebackType
from typing import Any, Self

import structlog

from lorabatch.files import Files
from lorabatch.logs import trace
from lorabatch.openai_batches import OpenAIBatches
from lorabatch_producer.client import Producer
from lorabatch_producer.server.batch_steps import Gone, Held, Steps
from lorabatch_producer.server.tidying import tidy

__all__ = ["BatchWork"]

log = structlog.get_logger(__name__)

THREADS = 2  # a large file delays no small one, unless there are two
LOOK_S = 0.5
AFTER_ERROR_S = 5.0
TIDY_S = 60.0


class BatchWork:
    """`async with BatchWork(producer) as work`. Used from one event loop."""

    def __init__(self, producer: Producer) -> None:
        self._producer = producer
        self._settings = producer.settings
        self._stopping = threading.Event()
        self._came = asyncio.Event()
        self._tidied_s = float("-inf")
        self._running: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._running = [asyncio.create_task(self._run()) for _ in range(THREADS)]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """What is held is given back within a chunk of lines."""
        self._stopping.set()
        self._came.set()
        await asyncio.gather(*self._running)

    def wake(self) -> None:
        """There is something new."""
        self._came.set()

    async def _run(self) -> None:
        while not self._stopping.is_set():
            self._came.clear()
            pause_s = await asyncio.to_thread(self._one)
            with contextlib.suppress(TimeoutError):
                if pause_s:
                    await asyncio.wait_for(self._came.wait(), pause_s)

    def _one(self) -> float:
        """Work on what is due; after how many seconds to look again."""
        try:
            self._tidy()
            engine = self._producer.ledger.engine
            row = OpenAIBatches(engine).take(self._settings.lease_s)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is tried again
            log.error("batches cannot be looked for", trace=trace(error))
            return AFTER_ERROR_S
        if row is None:
            return LOOK_S
        self._work_on(row)
        return 0.0

    def _work_on(self, row: Any) -> None:
        batches = OpenAIBatches(self._producer.ledger.engine)
        held = Held(batches, row, self._settings.lease_s, self._stopping.is_set)
        again_s = 0.0
        try:
            again_s = Steps(self._producer, held).run()
        except Gone:
            pass
        except Exception as error:  # noqa: BLE001 - the same
            log.error("batch not worked on", batch_id=row.batch_id, trace=trace(error))
            again_s = AFTER_ERROR_S
        try:
            batches.give_back(held.row, again_s)
        except Exception as error:  # noqa: BLE001 - its lease runs out
            log.error("batch not given back", batch_id=row.batch_id, trace=trace(error))

    def _tidy(self) -> None:
        if time.monotonic() - self._tidied_s >= TIDY_S:
            self._tidied_s = time.monotonic()
            tidy(Files(self._producer.ledger.engine), self._settings.files_folder)
