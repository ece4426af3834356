"""Waiting for something to become true, with a limit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["NotWithin", "until"]

T = TypeVar("T")
PAUSE_S = 0.03


class NotWithin(AssertionError):
    """What was waited for did not come."""


def until(
    what: str,
    ready: Callable[[], T],
    limit_s: float = 60.0,
    shown: Callable[[], object] | None = None,
) -> T:
    """Poll until `ready()` is true and return it. Raises NotWithin, with what was `shown` last."""
    end_s = time.monotonic() + limit_s
    while not (value := ready()):
        if time.monotonic() > end_s:
            raise NotWithin(
                f"not within {limit_s:g} s: {what} (last: {shown() if shown else value!r})"
            )
        time.sleep(PAUSE_S)
    return value
