"""Database calls that are tried again until they work: an outage delays, it loses nothing.

Raises Stopped when the worker stops first. What is not an outage (a constraint, a bad value)
passes through. Logs the driver's first line only: statements carry prompts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, TypeVar

import sqlalchemy as sa
import structlog

__all__ = ["OUTAGES", "Stopped", "reason", "until_it_works"]

log = structlog.get_logger(__name__)
T = TypeVar("T")

OUTAGES: Final = (
    sa.exc.OperationalError,
    sa.exc.InterfaceError,
    sa.exc.InternalError,
    sa.exc.TimeoutError,
)
FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 5.0


class Stopped(Exception):
    """The worker stops; the call was not made."""


def reason(error: BaseException) -> str:
    """An exception as one line without the statement and its parameters."""
    inner = getattr(error, "orig", None) or error
    lines = str(inner).strip().splitlines()
    return f"{type(inner).__name__}: {lines[0] if lines else ''}"


def until_it_works(what: str, stop: threading.Event, call: Callable[[], T]) -> T:
    """The result of `call`, however long the database is away."""
    delay_s = FIRST_DELAY_S
    while True:
        try:
            return call()
        except OUTAGES as error:
            log.warning("database does not answer", doing=what, error=reason(error), wait_s=delay_s)
            if stop.wait(delay_s):
                raise Stopped(what) from None
            delay_s = min(delay_s * 2, LONGEST_DELAY_S)
