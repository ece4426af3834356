"""EnginePool: a Celery worker pool whose slots are sequences of a continuous-batching engine.

Celery's default strategy brings every message here as `on_apply`: ours go to the service, any
other task runs on a small thread pool. A message is acknowledged only when the ledger has its
outcome, in the order commit, publish, acknowledge. Jobs outlive the broker's connection: after
a reconnect the message comes again and is attached to the running job or finds it ended.

Shutdown: SIGTERM drains for drain_s and releases the rest; a second SIGTERM or SIGQUIT releases
at once. While it runs the hub's loop is dead, so `_pump` runs the callbacks (acknowledgements).
`on_apply` raises nothing; a start that fails prints one line and exits with EXIT_NOT_READY. An
engine that can go on only in a new process ends this one with EXIT_BROKEN.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import structlog
from billiard.einfo import ExceptionInfo
from billiard.exceptions import Terminated
from celery import signals
from celery.concurrency.base import BasePool, apply_target
from celery.exceptions import WorkerShutdown
from celery.worker import state as worker_state

from lorabatch.errors import LoraBatchError
from lorabatch.queue import TASK_NAME
from lorabatch.result import Result
from lorabatch.told import failure
from lorabatch_worker.delivery import Delivery
from lorabatch_worker.links import links_of
from lorabatch_worker.request import EXPIRES_S, HAND_BACK, REVOKED
from lorabatch_worker.service import Service

__all__ = ["EXIT_BROKEN", "EXIT_NOT_READY", "EnginePool"]

log = structlog.get_logger(__name__)

EXIT_NOT_READY = 2
EXIT_BROKEN = 3
SIDE_THREADS = 2
PUMP_S = 0.02


class EnginePool(BasePool):
    """`worker_pool` of our worker app; the app carries settings and the runner's factory."""

    signal_safe = False
    body_can_be_buffer = True
    task_join_will_block = False
    uses_semaphore = False

    service: Service | None = None
    _hub: Any = None
    _ready = False
    _awaited = False
    _stopping = False
    _terms = 0

    # -- start ---------------------------------------------------------------

    def on_start(self) -> None:
        parts = self.app.lorabatch
        try:
            self.service = Service(
                self.app, parts.settings, parts.runner_factory, self._post, self._give_up
            )
        except LoraBatchError as error:
            print(f"lorabatch-worker: {error}", file=sys.stderr, flush=True)  # noqa: T201
            raise WorkerShutdown(EXIT_NOT_READY) from None
        self._settings = parts.settings
        self._posted = deque[Callable[[], None]]()
        self._side = ThreadPoolExecutor(SIDE_THREADS, thread_name_prefix="side")
        signals.worker_shutting_down.connect(self._on_signal, weak=True)
        # Celery's own answer to SIGUSR1 shows what is in variables, prompts too, and may end us.
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        self.service.start()

    def register_with_event_loop(self, hub: Any) -> None:
        """Called when the consumer's loop starts, at every connection anew."""
        self._hub = hub
        if self._awaited:  # from the loop before
            self._await_posted()
        if not self._ready:
            self._ready = True
            self._post(self._say_ready)

    # -- messages (hub thread) -------------------------------------------------

    def apply_async(self, target: Any, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """As BasePool's, but without its debug line, which holds the body."""
        return self.on_apply(target, args or [], kwargs or {}, **options)

    def on_apply(
        self,
        target: Callable[..., Any],
        args: Any,
        kwargs: Any,
        callback: Any = None,
        accept_callback: Any = None,
        error_callback: Any = None,
        soft_timeout: float | None = None,
        timeout: float | None = None,
        **_: Any,
    ) -> Any:
        name, task_id, request = args[:3]
        if name != TASK_NAME:
            return self._side.submit(apply_target, target, args, kwargs, callback, accept_callback)
        limits = [limit for limit in (soft_timeout, timeout) if limit]
        delivery = Delivery(
            task_id=task_id,
            args=request["args"],
            kwargs=request["kwargs"],
            publish=not request.get("ignore_result"),
            links=links_of(request),
            time_limit_s=min(limits) if limits else None,
            expires_s=request.get(EXPIRES_S),
            revoked=REVOKED in request,
            on_started=lambda: accept_callback(task_id, time.monotonic()),
            on_ended=lambda result: _tell(result, callback, error_callback),
            on_postponed=request.get(HAND_BACK),
        )
        return self._take(delivery)

    def refuse(
        self, headers: Mapping[str, Any], reason: str, acknowledge: Callable[[], None]
    ) -> None:
        """A generate message that cannot be read: record it as a failed job."""
        task_id = headers.get("id")
        known = isinstance(task_id, str)
        self._take(
            Delivery(
                task_id=str(task_id) if known else "",
                on_ended=lambda _: acknowledge(),
                publish=known and not headers.get("ignore_result"),
                refusal=reason,
            )
        )

    def terminate_job(self, pid: str, signal: Any = None) -> None:
        """`pid` is what `on_started` gave: the job's id."""
        assert self.service is not None
        self.service.abort(pid)

    def flush(self) -> None:
        """Connection lost, or shutdown: the jobs go on, so there is nothing to forget."""

    # -- stop ------------------------------------------------------------------

    def on_stop(self) -> None:
        if worker_state.should_terminate in (None, False):
            self._stop(0.0 if worker_state.should_stop == EXIT_BROKEN else self._settings.drain_s)

    def on_terminate(self) -> None:
        self._stop(0.0)

    def _stop(self, drain_s: float) -> None:
        """Once only: SIGQUIT calls `on_stop` inside a signal handler, `on_stop` included."""
        if self.service is None or self._stopping:
            return
        self._stopping = True
        log.info("stopping", drain_s=drain_s, **self.service.counts())
        self._side.shutdown(wait=drain_s > 0, cancel_futures=True)
        self.service.stop(drain_s, self._pump)
        self._run_callbacks()
        log.info("stopped")

    def _pump(self, busy: Callable[[], bool], limit_s: float, hurry: bool = False) -> None:
        end_s = time.monotonic() + limit_s
        while busy() and time.monotonic() < end_s and not (hurry and self._in_a_hurry()):
            self._run_callbacks()
            time.sleep(PUMP_S)
        self._run_callbacks()

    def _run_callbacks(self) -> None:
        if self._hub is None:
            return
        self._hub.fire_timers()
        while ready := self._hub._pop_ready():
            for callback in ready:
                callback()

    def _in_a_hurry(self) -> bool:
        return self._terms > 1 or worker_state.should_terminate not in (None, False)

    @staticmethod
    def _give_up() -> None:
        """The consumer's loop looks at this, and so does its wait for a broker."""
        worker_state.should_stop = EXIT_BROKEN

    def _on_signal(self, **_: Any) -> None:
        self._terms += 1

    # -- inside ----------------------------------------------------------------

    @property
    def beating(self) -> bool:
        return self.service is not None and self.service.pulse.beating

    def _get_info(self) -> dict[str, Any]:
        counts = self.service.counts() if self.service else {}
        settings = self.app.lorabatch.settings
        about = {"queues": list(settings.consume), "base_model": settings.base_model}
        return {**super()._get_info(), **about, **counts}

    def _take(self, delivery: Delivery) -> Delivery:
        assert self.service is not None
        self.service.take(delivery)
        return delivery

    def _post(self, call: Callable[[], None]) -> None:
        """Any thread: run a call on the hub's. Those of one moment are one callback of the hub."""
        self._posted.append(call)
        if not self._awaited:
            self._await_posted()

    def _await_posted(self) -> None:
        self._awaited = True
        if self._hub is not None:  # else as soon as there is one
            self._hub.call_soon(self._run_posted)

    def _run_posted(self) -> None:
        self._awaited = False  # first: what is posted from here on may come too late for this round
        while self._posted:
            call = self._posted.popleft()
            try:
                call()
            except Exception as error:  # noqa: BLE001 - nothing posted may stop the worker
                log.error("callback failed", error=f"{type(error).__name__}: {error}")

    def _say_ready(self) -> None:
        assert self.service is not None
        runner = self.service.runner
        about = getattr(runner, "description", None) or type(runner).__name__
        queues = ",".join(self._settings.consume)
        log.info("ready", engine=str(about), queues=queues, broker=self.service.broker)


def _tell(result: Result, callback: Any, error_callback: Any) -> None:
    """Celery's bookkeeping of an end: state, event, acknowledgement. It stores no result: the
    publisher has done that."""
    if result.state == "succeeded":
        callback((0, "succeeded", 0.0))
    elif result.state == "cancelled":
        error_callback(_info(Terminated("cancelled")))
    else:
        callback((1, _info(failure(result)), 0.0))


def _info(error: Exception) -> Any:
    try:
        raise error
    except type(error):
        return ExceptionInfo()
