"""Adapters that could not be used, and until when nobody tries them again.

What is wrong with a registered version itself, the registry says to all workers, for longer after
each failure; somebody may say that it is to be tried again at once. Sources that do not answer,
adapters that are not registered and merges are this worker's own matter: it remembers them for a
minute, or until the files change. Raises AdapterSetAside.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from datetime import UTC, datetime

from lorabatch.errors import AdapterSetAside
from lorabatch_worker.adapters.catalog import Entry

__all__ = ["Setbacks"]

PAUSE_S = 60.0
REMEMBERED = 10_000


@dataclass(frozen=True)
class _Setback:
    of: object
    reason: str
    until_s: float


def check_fault(entry: Entry) -> None:
    """Raise AdapterSetAside if the registry says that this version has to wait."""
    fault = entry.fault
    if fault is None or fault.due:
        return
    again = datetime.fromtimestamp(fault.retry_us / 1e6, UTC)
    whose = f" --tenant {entry.tenant}" if entry.tenant else ""
    raise AdapterSetAside(
        f"{fault.reason} (failed {fault.failures} times; tried again from "
        f"{again:%Y-%m-%d %H:%M:%S} UTC on, or after `lorabatch adapters retry "
        f"{entry.adapter_id}{whose}`)"
    )


class Setbacks:
    """Those of this worker. For many threads; nothing here waits."""

    def __init__(self) -> None:
        self._noted: OrderedDict[Hashable, _Setback] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, key: Hashable, signature: object = None) -> None:
        """Raise AdapterSetAside if this one, of files with this signature, has to wait."""
        with self._lock:
            setback = self._noted.get(key)
        if setback is None or setback.of != signature:
            return
        left_s = setback.until_s - time.monotonic()
        if left_s > 0:
            raise AdapterSetAside(f"{setback.reason} (tried again in {left_s:.0f} s)")

    def note(self, key: Hashable, signature: object, reason: str) -> None:
        """It failed."""
        with self._lock:
            self._noted[key] = _Setback(signature, reason, time.monotonic() + PAUSE_S)
            self._noted.move_to_end(key)
            if len(self._noted) > REMEMBERED:
                self._noted.popitem(last=False)

    def forget(self, key: Hashable) -> None:
        """It works, or is to be tried again."""
        with self._lock:
            self._noted.pop(key, None)
