"""A Celery result backend that reads the ledger: `AsyncResult` without result keys in Redis.

    app = Celery(broker="redis://...", backend="lorabatch+postgresql://user:pw@host/db")
    app.send_task("lorabatch.generate", kwargs={"prompt": "Hello"}).get()["text"]

`lorabatch+` stands before a database URL; `lorabatch` alone means the database of our settings.
STARTED: a worker has the job in hand. Nothing is written, so that nothing expires either, and
`forget` does nothing: results are the books that tenants are billed by. A worker with
LORABATCH_RESULT_BACKEND_URL=lorabatch publishes no results.

PENDING is said of all that the ledger has no row of, and for ever where it will never have one:
a task id that was never sent, or that cannot be a job id; any other task's, a link's for example;
and one whose message gave an idempotency key that was known already, with the same request or with
another: that job has another id, and no row says that they belong together. So leave the key
out and give it as the task id, which is a key as well.

Not covered: chords and saved groups; a ResultSet can be waited for. Raises DatabaseNotReady,
SettingsError, and in waits celery's TimeoutError; database errors pass through, or are retried
where `result_backend_always_retry` is set.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from celery import Celery, states
from celery.backends.base import BaseBackend
from celery.exceptions import TimeoutError

from lorabatch import Ledger, Result, Settings
from lorabatch.database import open_database
from lorabatch.result import TERMINAL_STATES, JobState
from lorabatch.told import told
from lorabatch_producer.waiting import LAST_PAUSE_S, Pauses

__all__ = ["LedgerBackend"]

Meta = dict[str, Any]


class LedgerBackend(BaseBackend):
    """One for all threads of an app. Opens the database when it is first asked for a result."""

    supports_native_join = True

    def __init__(self, app: Celery, url: str | None = None, **options: Any) -> None:
        super().__init__(app, url=url, **options)
        self.thread_safe = True
        self._lock = threading.Lock()
        self._ledger: Ledger | None = None
        self._opened_by = os.getpid()

    def __reduce__(self, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        return super().__reduce__(args, {**(kwargs or {}), "url": self.url})

    def close(self) -> None:
        """Close the connections; a later look opens new ones."""
        with self._lock:
            if self._ledger is not None:
                self._ledger.engine.dispose()
            self._ledger = None

    # -- waiting -------------------------------------------------------------

    def wait_for(
        self,
        task_id: str,
        timeout: float | None = None,
        interval: float | None = None,
        no_ack: bool = True,
        on_interval: Callable[[], Any] | None = None,
    ) -> Meta:
        """The end of one task. Raises celery's TimeoutError."""
        self._ensure_not_eager()
        found = self.get_many([task_id], timeout, interval, on_interval=on_interval)
        return next(iter(found))[1]

    def get_many(
        self,
        task_ids: Iterable[str],
        timeout: float | None = None,
        interval: float | None = None,
        no_ack: bool = True,
        on_message: Callable[[Meta], Any] | None = None,
        on_interval: Callable[[], Any] | None = None,
        max_iterations: int | None = None,
    ) -> Iterator[tuple[str, Meta]]:
        """Tasks as they end, by one look at all of them; `interval` is the longest pause."""
        waiting = {str(task_id): task_id for task_id in task_ids}
        pauses = Pauses(LAST_PAUSE_S if interval is None else interval)
        end_s = None if timeout is None else time.monotonic() + timeout
        looks = 0
        while waiting:
            began_s = time.monotonic()
            metas = self._ensure_retryable(self._look, list(waiting))
            took_s = time.monotonic() - began_s
            ready = {name: meta for name, meta in metas.items() if meta["date_done"] is not None}
            for name, meta in ready.items():
                if on_message is not None:
                    on_message(meta)
                yield waiting.pop(name), meta
            looks += 1
            if not waiting or looks == max_iterations:
                return
            if end_s is not None and time.monotonic() >= end_s:
                raise TimeoutError(f"{len(waiting)} not ended after {timeout:g} s")
            if on_interval is not None:
                on_interval()
            if ready:
                pauses.restart()
            pause_s = pauses.after(took_s)
            time.sleep(pause_s if end_s is None else min(pause_s, max(0, end_s - time.monotonic())))

    # -- what BaseBackend asks for ---------------------------------------------

    def exception_safe_to_retry(self, error: Exception) -> bool:
        return isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError)

    def ensure_chords_allowed(self) -> None:
        raise NotImplementedError(
            "chords need a result backend that counts their parts, and the ledger does not: wait "
            "for the group and send the body then, or use a Redis result backend for other tasks"
        )

    def _get_task_meta_for(self, task_id: str) -> Meta:
        return self._look([str(task_id)])[str(task_id)]

    def _store_result(self, task_id: str, result: Any, *_: Any, **__: Any) -> Any:
        """The ledger has it, or will have it from the worker that runs the job."""
        return result

    def _forget(self, task_id: str) -> None:
        """The ledger keeps it."""

    # -- inside --------------------------------------------------------------

    def _look(self, task_ids: Sequence[str]) -> dict[str, Meta]:
        ledger = self._open()
        found = ledger.states(task_ids)
        ended = [task_id for task_id in task_ids if found.get(task_id) in TERMINAL_STATES]
        results = ledger.results(ended)
        return {i: _meta(i, found.get(i), results.get(i)) for i in task_ids}

    def _open(self) -> Ledger:
        with self._lock:
            if self._ledger is not None and self._opened_by != os.getpid():
                self._ledger.engine.dispose(close=False)  # a fork: they are the parent's
                self._ledger = None
            if self._ledger is None:
                given = {"database_url": self.url} if self.url else {}
                self._opened_by = os.getpid()
                self._ledger = Ledger(open_database(Settings.load(**given)))
            return self._ledger


def _meta(task_id: str, state: JobState | None, result: Result | None) -> Meta:
    """What Celery keeps of a task. `date_done` is None for one that is not ready."""
    meta: Meta = {"task_id": task_id, "traceback": None, "children": None, "date_done": None}
    if result is None:
        status = states.STARTED if state == "running" else states.PENDING
        return {**meta, "status": status, "result": None}
    status, value = told(result)
    done = datetime.fromtimestamp((result.finished_us or 0) / 1e6, UTC).isoformat()
    return {**meta, "status": status, "result": value, "date_done": done}
