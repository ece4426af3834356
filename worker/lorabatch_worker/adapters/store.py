"""Adapters in host memory: loaded on threads of their own, kept least recently used.

Nothing here is called from the engine's step loop but `Future.result` of what is done. One
adapter that is slow to come delays nobody else's jobs. A local folder whose files changed is
read anew and gets a new version; sequences keep the adapter object they were given.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lorabatch_worker.adapters.catalog import AdapterCatalog
from lorabatch_worker.adapters.weights import FILES, Adapter, AdapterTarget, read_adapter
from lorabatch_worker.threads import compute_with

__all__ = ["AdapterStore"]

LOADERS = 8
Signature = tuple[tuple[str, int, int], ...]


class AdapterStore:
    """Loads each adapter once, however many jobs ask for it at the same time."""

    def __init__(self, catalog: AdapterCatalog, target: AdapterTarget, capacity_bytes: int) -> None:
        self.catalog = catalog
        self._target = target
        self._capacity = capacity_bytes
        self._loaded: OrderedDict[str, tuple[Path, Signature, Adapter]] = OrderedDict()
        self._loading: dict[str, Future[Adapter]] = {}
        self._lock = threading.Lock()
        # One OpenMP thread each: more would take the engine's threads their cores.
        self._pool = ThreadPoolExecutor(
            LOADERS, "adapter-load", initializer=compute_with, initargs=(1,)
        )

    def request(self, adapter_id: str) -> Future[Adapter]:
        """The adapter, now or when it is loaded; its failure is the future's exception."""
        known = self._known(adapter_id)
        if known is not None:  # at once: all threads may be busy with slow ones
            ready: Future[Adapter] = Future()
            ready.set_result(known)
            return ready
        with self._lock:
            future = self._loading.get(adapter_id)
            if future is None:
                future = self._pool.submit(self._load, adapter_id)
                self._loading[adapter_id] = future
                future.add_done_callback(lambda _: self._loading.pop(adapter_id, None))
            return future

    def _known(self, adapter_id: str) -> Adapter | None:
        """The adapter if it is in memory and its files are as they were."""
        with self._lock:
            known = self._loaded.get(adapter_id)
        if known is None or _signature(known[0]) != known[1]:
            return None
        with self._lock:
            if adapter_id in self._loaded:
                self._loaded.move_to_end(adapter_id)
        return known[2]

    def _load(self, adapter_id: str) -> Adapter:
        known = self._known(adapter_id)  # loaded while this waited for its thread
        if known is not None:
            return known
        folder = self.catalog.locate(adapter_id)
        signature = _signature(folder)
        adapter = read_adapter(adapter_id, folder, self._target)
        with self._lock:
            self._loaded[adapter_id] = (folder, signature, adapter)
            self._loaded.move_to_end(adapter_id)
            self._evict()
        return adapter

    def _evict(self) -> None:
        held = sum(adapter.nbytes for _, _, adapter in self._loaded.values())
        while held > self._capacity and len(self._loaded) > 1:
            _, (_, _, adapter) = self._loaded.popitem(last=False)
            held -= adapter.nbytes

    @property
    def loaded(self) -> list[str]:
        """Names in host memory, least recently used first."""
        with self._lock:
            return list(self._loaded)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _signature(folder: Path) -> Signature:
    """What changes when the files do: name, size and time of each."""
    found = []
    for name in FILES:
        try:
            stat = (folder / name).stat()
        except OSError:
            continue
        found.append((name, stat.st_size, stat.st_mtime_ns))
    return tuple(found)
