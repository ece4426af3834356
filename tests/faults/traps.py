"""Boundaries inside a worker process where a signal can be made to come. Test code only.

Runs in the worker. A trap file, `FAULT_TRAP`, says "boundary count signal": at the count-th passing
of that boundary the process sends itself that signal, and the file is renamed to *.sprung. Nothing
of the product knows of it: `lay_traps` wraps its methods from outside.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from lorabatch.ledger import Ledger
from lorabatch_worker import transport
from lorabatch_worker.publisher import Publisher
from tests.fake_runner import FakeRunner

__all__ = ["BOUNDARIES", "lay_traps"]

BOUNDARIES = (
    "popped",  # the broker has noted the messages as given out, nobody here knows them
    "claimed",
    "admitted",  # just before the first step
    "stepping",
    "ended",  # the outcome is there, its transaction has not begun
    "before-commit",
    "committed",
    "published",
    "acknowledging",  # just before the broker is told
)


class _Trap:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._text, self._left = "", 0

    def passed(self, boundary: str, with_anything: object = True) -> None:
        if not with_anything or not self._file.exists():
            return
        with self._lock, suppress(FileNotFoundError):  # sprung or taken away since that look
            text = self._file.read_text()
            wanted, count, number = text.split()
            if text != self._text:
                self._text, self._left = text, int(count)
            if wanted != boundary:
                return
            self._left -= 1
            if self._left == 0:
                self._file.rename(self._file.with_suffix(".sprung"))
                os.kill(os.getpid(), int(number))


def lay_traps(file: Path) -> None:
    """Wrap what a job passes on its way."""
    trap = _Trap(file)
    _wrap_record(trap)
    _wrap(transport.Channel, "_deliver", first=lambda _: trap.passed("popped"))
    _wrap(Ledger, "claim", then=lambda claims: trap.passed("claimed", claims))
    _wrap(FakeRunner, "_admit", then=lambda started: trap.passed("admitted", started))
    _wrap(FakeRunner, "_step", first=lambda runner: trap.passed("stepping", runner._running))
    _wrap(Publisher, "_publish", then=lambda _: trap.passed("published"))
    _wrap(transport.QoS, "send_acks", first=lambda qos: trap.passed("acknowledging", qos._acked))


def _wrap_record(trap: _Trap) -> None:
    original = Ledger.record
    recording = threading.local()

    @wraps(original)
    def record(self: Ledger, *args: Any, **options: Any) -> set[str]:
        trap.passed("ended")
        recording.now = True
        try:
            written = original(self, *args, **options)
        finally:
            recording.now = False
        trap.passed("committed")
        return written

    def committing(_: sa.Connection) -> None:
        trap.passed("before-commit", getattr(recording, "now", False))

    Ledger.record = record  # type: ignore[method-assign]
    sa.event.listen(sa.Engine, "commit", committing)


def _wrap(
    of: type,
    name: str,
    first: Callable[[Any], object] = lambda _: None,
    then: Callable[[Any], object] = lambda _: None,
) -> None:
    """`first` gets the object before the call, `then` what the call gave."""
    original = getattr(of, name)

    @wraps(original)
    def wrapped(self: Any, *args: Any, **options: Any) -> Any:
        first(self)
        value = original(self, *args, **options)
        then(value)
        return value

    setattr(of, name, wrapped)
