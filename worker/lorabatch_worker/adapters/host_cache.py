"""Loaded adapters in host memory, kept least recently used up to a number of bytes.

Keys are versions, (tenant, name) of what has none, and merges. One that was read where it lies is
there only as long as its files are as they were. The newest stays however large it is, and so do
pinned versions. For many threads; nothing here waits but for a folder's file times, and `put` for
`pinned`. Raises what `pinned` raises.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

from lorabatch_worker.adapters.catalog import Entry
from lorabatch_worker.adapters.wanted import WantedMerge
from lorabatch_worker.adapters.weights import FILES, Adapter

__all__ = ["HostCache", "Key", "Origin", "Signature", "signature_of"]

Signature = tuple[tuple[str, int, int], ...]
Key = str | tuple[str, str] | WantedMerge


@dataclass(frozen=True)
class Origin:
    """Where an adapter came from. `entry` None: it is a merge. `signature`: of the files of a
    folder that may change."""

    key: Key
    entry: Entry | None = None
    signature: Signature | None = None

    @property
    def is_current(self) -> bool:
        if self.signature is None or self.entry is None:
            return True
        return signature_of(Path(self.entry.location.place)) == self.signature


class HostCache:
    """`pinned` gives versions that stay."""

    def __init__(self, capacity_bytes: int, pinned: Callable[[], set[str]]) -> None:
        self.capacity_bytes = capacity_bytes
        self._pinned = pinned
        self._held: OrderedDict[Key, Adapter] = OrderedDict()
        self._origins: WeakKeyDictionary[Adapter, Origin] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def get(self, key: Key) -> Adapter | None:
        """The adapter if it is here and its files are as they were."""
        with self._lock:
            adapter = self._held.get(key)
            origin = None if adapter is None else self._origins[adapter]
        if adapter is None or origin is None or not origin.is_current:
            return None
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
        return adapter

    def held(self, key: Key) -> Adapter | None:
        """The adapter if it is here, whatever its files are by now; looks at no file."""
        with self._lock:
            return self._held.get(key)

    def put(self, adapter: Adapter, origin: Origin) -> None:
        full = self.nbytes + adapter.nbytes > self.capacity_bytes
        stay = {origin.key, *(self._pinned() if full else ())}
        with self._lock:
            self._held[origin.key] = adapter
            self._held.move_to_end(origin.key)
            self._origins[adapter] = origin
            over = self._nbytes() - self.capacity_bytes
            for key in [k for k in self._held if k not in stay]:
                if over <= 0:
                    break
                over -= self._held.pop(key).nbytes

    def drop(self, adapter: Adapter) -> Origin:
        """Forget it under all its keys: where it came from, though it may have gone long ago."""
        with self._lock:
            for key in [k for k, held in self._held.items() if held.version == adapter.version]:
                del self._held[key]
            return self._origins.get(adapter) or Origin(adapter.version)

    @property
    def names(self) -> list[str]:
        """Least recently used first."""
        with self._lock:
            return [adapter.adapter_id for adapter in self._held.values()]

    @property
    def nbytes(self) -> int:
        with self._lock:
            return self._nbytes()

    def _nbytes(self) -> int:
        return sum(adapter.nbytes for adapter in self._held.values())


def signature_of(folder: Path) -> Signature:
    """What changes when the files do: name, size and time of each."""
    found = []
    for name in FILES:
        try:
            stat = (folder / name).stat()
        except OSError:
            continue
        found.append((name, stat.st_size, stat.st_mtime_ns))
    return tuple(found)
