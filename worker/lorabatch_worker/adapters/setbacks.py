"""Adapters that could not be used, and until when nobody tries them again.

Of a registered version the registry says so to all workers, for longer after each failure; somebody
may say that it is to be tried again at once. Of one that is not registered this worker remembers it
for a minute, or until the files change. Raises AdapterSetAside.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from lorabatch.errors import AdapterSetAside, LoraBatchError
from lorabatch_worker.adapters.catalog import AdapterCatalog, Entry

__all__ = ["Setbacks"]

PAUSE_S = 60.0


@dataclass(frozen=True)
class _Setback:
    of: object
    reason: str
    until_s: float


class Setbacks:
    """For many threads."""

    def __init__(self, catalog: AdapterCatalog) -> None:
        self._catalog = catalog
        self._noted: dict[str, _Setback] = {}  # of names without a version
        self._lock = threading.Lock()

    def check(self, entry: Entry, signature: object) -> None:
        """Raise AdapterSetAside if this one, of files with this signature, has to wait."""
        fault = entry.fault
        if fault is not None and not fault.due:
            again = datetime.fromtimestamp(fault.retry_us / 1e6, UTC)
            raise AdapterSetAside(
                f"{fault.reason} (failed {fault.failures} times; tried again from "
                f"{again:%Y-%m-%d %H:%M:%S} UTC on, or after `lorabatch adapters retry "
                f"{entry.adapter_id}`)"
            )
        with self._lock:
            setback = self._noted.get(entry.adapter_id)
        if entry.version is None and setback is not None and setback.of == signature:
            left_s = setback.until_s - time.monotonic()
            if left_s > 0:
                raise AdapterSetAside(f"{setback.reason} (tried again in {left_s:.0f} s)")

    def note(self, entry: Entry, signature: object, error: LoraBatchError) -> None:
        """It failed."""
        if entry.version is not None:
            self._catalog.set_aside(entry, error)
            return
        setback = _Setback(signature, str(error), time.monotonic() + PAUSE_S)
        with self._lock:
            self._noted[entry.adapter_id] = setback

    def forget(self, entry: Entry) -> None:
        """It works."""
        if entry.fault is not None:
            self._catalog.forgive(entry)
        with self._lock:
            self._noted.pop(entry.adapter_id, None)
