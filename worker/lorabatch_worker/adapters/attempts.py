"""A source that does not answer is tried again, with longer and longer waits, until a deadline.

Every wait ends at once when the worker stops. Times are seconds. `Absent`, `Refused` and `Failed`
are what is not tried again; every other exception is taken for a passing fault. Not covered: how
long one network wait may last, which is the source's.
"""

from __future__ import annotations

import errno
import random
import re
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import structlog

__all__ = ["Absent", "Busy", "Deadline", "Failed", "Refused", "one_line", "until_it_comes"]

log = structlog.get_logger(__name__)
T = TypeVar("T")

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0
TIMEOUT_SETTING = "LORABATCH_ADAPTER_FETCH_TIMEOUT_S"
DISK_FAULTS = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
NO_ROOM = {errno.ENOSPC, errno.EROFS, errno.EDQUOT}


class Absent(Exception):
    """The source has no such adapter, or none that may be read with what it was shown."""


class Refused(Exception):
    """It is there and will not be taken, whenever it is asked for. `public`: without places."""

    def __init__(self, text: str, public: str | None = None) -> None:
        super().__init__(text)
        self.public = text if public is None else public


class Failed(Exception):
    """It cannot be had now, and another attempt would not change that."""


class Busy(Exception):
    """A passing fault, of a source that may say when to come again."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class Deadline:
    """When an adapter must have come, all attempts together, or the worker stops."""

    def __init__(self, seconds: float, stop: threading.Event) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds
        self._stop = stop

    @property
    def left_s(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def check(self, last: str = "") -> None:
        """Raises Failed if it is over; asked between two pieces of a file. `last`: what failed."""
        if self._stop.is_set():
            raise Failed("the worker stops")
        if not self.left_s:
            after = f" (the last fault was {last})" if last else ""
            raise Failed(f"it took longer than {self._seconds:g} s{after}; raise {TIMEOUT_SETTING}")

    def wait(self, seconds: float, last: str) -> None:
        self._stop.wait(min(seconds, self.left_s))
        self.check(last)


def until_it_comes(call: Callable[[], T], attempts: int, deadline: Deadline, what: str) -> T:
    """The result of `call`. Raises Absent, Refused, Failed."""
    for attempt in range(1, attempts + 1):
        deadline.check()
        try:
            return call()
        except (Absent, Refused, Failed):
            raise
        except Exception as error:  # noqa: BLE001 - sources raise from several trees
            reason = one_line(error)
            if _is_ours(error):
                raise Failed(reason) from None
            if attempt == attempts:
                raise Failed(f"{attempts} attempts failed, the last with {reason}") from None
            delay_s = max(getattr(error, "wait_s", 0.0), _delay(attempt))
            log.warning("adapter source failed", source=what, reason=reason, wait_s=delay_s)
        deadline.wait(delay_s, reason)
    raise AssertionError("at least one attempt")


def _is_ours(error: Exception) -> bool:
    """Of this machine's disk. The network's errors are OSErrors too, of other kinds."""
    return isinstance(error, DISK_FAULTS) or getattr(error, "errno", None) in NO_ROOM


def _delay(attempt: int) -> float:
    """Doubles; half of it is left to chance, so that workers do not come all at once."""
    longest = min(FIRST_DELAY_S * 2.0 ** (attempt - 1), LONGEST_DELAY_S)
    return longest * random.uniform(0.5, 1.0)


def one_line(error: BaseException) -> str:
    """An exception as one line. Without passwords and query strings: signed URLs carry secrets."""
    lines = str(error).strip().splitlines()
    text = re.sub(r"\?[^\s'\"]+", "?...", lines[0] if lines else "")
    text = re.sub(r"//[^/\s@]+@", "//***@", text)
    name = type(error).__name__
    return text if isinstance(error, Busy) else f"{name}: {text}" if text else name
