"""Adapters in host memory: loaded on threads of their own, kept least recently used.

Nothing here is called from the engine's step loop but `Future.result` of what is done. One adapter
that is slow to come delays nobody else's jobs. A local folder whose files changed is read anew and
gets a new version; sequences keep the adapter object they were given. An adapter that could not be
used is set aside (setbacks.py): its jobs fail at once until it is tried again. Merges are kept like
adapters, as long as what they were made of is wanted in the same versions.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from lorabatch.errors import AdapterUnavailable, InvalidAdapter, LoraBatchError
from lorabatch_worker.adapters.catalog import AdapterCatalog, Entry
from lorabatch_worker.adapters.merge import merge
from lorabatch_worker.adapters.setbacks import Setbacks
from lorabatch_worker.adapters.wanted import Wanted, WantedMerge
from lorabatch_worker.adapters.weights import (
    FILES,
    Adapter,
    AdapterTarget,
    read_adapter,
    version_of,
)
from lorabatch_worker.retry import Stopped
from lorabatch_worker.threads import compute_beside

__all__ = ["AdapterStore"]

log = structlog.get_logger(__name__)

LOADERS, FETCHERS = 8, 32
Signature = tuple[tuple[str, int, int], ...]
Key = str | tuple[str, str] | WantedMerge  # a version, (tenant, name) of what has none, a merge


@dataclass(frozen=True)
class _Held:
    """An adapter in memory. `signature`: of the files of a folder that may change."""

    adapter: Adapter
    entry: Entry | None
    signature: Signature | None = None

    @property
    def is_current(self) -> bool:
        if self.signature is None or self.entry is None:
            return True
        return _signature(Path(self.entry.location.place)) == self.signature


class AdapterStore:
    """Loads each adapter once, however many jobs ask for it at the same time."""

    def __init__(self, catalog: AdapterCatalog, target: AdapterTarget, capacity_bytes: int) -> None:
        self.catalog = catalog
        self._target = target
        self._capacity = capacity_bytes
        self._held: OrderedDict[Key, _Held] = OrderedDict()
        self._loading: dict[Wanted | WantedMerge, Future[Adapter]] = {}
        self._setbacks = Setbacks(catalog)
        self._lock = threading.Lock()
        self._reading = threading.Lock()  # one at a time: the engine's threads need the cores
        self._pool = ThreadPoolExecutor(LOADERS, "adapter-load", initializer=compute_beside)
        self._fetching = ThreadPoolExecutor(FETCHERS, "adapter-fetch", initializer=compute_beside)

    def request(self, wanted: Wanted | WantedMerge) -> Future[Adapter]:
        """The adapter, now or when it is loaded; its failure is the future's exception."""
        known = self._known(wanted)
        if known is not None:  # at once: all threads may be busy with slow ones
            ready: Future[Adapter] = Future()
            ready.set_result(known)
            return ready
        with self._lock:
            future = self._loading.get(wanted)
            if future is None:
                future = self._loading[wanted] = Future()
                future.add_done_callback(lambda _: self._loading.pop(wanted, None))
                self._pool.submit(self._answer, wanted, future)
            return future

    def preload(self) -> None:
        """Load what is configured and what is pinned, one after the other, as far as memory goes;
        log what cannot be used."""
        self._pool.submit(self._preload)

    def set_aside(self, adapter: Adapter, reason: str) -> None:
        """It was loaded and did harm: forget it, and let nobody try it again for a while."""
        with self._lock:
            keys = [k for k, held in self._held.items() if held.adapter.version == adapter.version]
            gone = [self._held.pop(key) for key in keys]
        error = InvalidAdapter(f"adapter {adapter.adapter_id!r}: {reason}")
        with contextlib.suppress(RuntimeError):  # the worker stops
            for held in gone:
                if held.entry is not None:
                    self._pool.submit(self._setbacks.note, held.entry, held.signature, error)

    @property
    def loaded(self) -> list[str]:
        """Names in host memory, least recently used first."""
        with self._lock:
            return [held.adapter.adapter_id for held in self._held.values()]

    @property
    def nbytes(self) -> int:
        """Of the adapters in host memory."""
        with self._lock:
            return self._nbytes()

    def close(self) -> None:
        self.catalog.close()
        for pool in (self._pool, self._fetching):
            pool.shutdown(wait=False, cancel_futures=True)
        for future in list(self._loading.values()):
            future.cancel()

    # -- on the store's threads --------------------------------------------------

    def _answer(self, wanted: Wanted | WantedMerge, future: Future[Adapter]) -> None:
        """On a thread that fetches if need be: those of a dead source are then all that wait."""
        try:
            if self._at_hand(wanted):
                self._resolve(wanted, future)
            else:
                self._fetching.submit(self._resolve, wanted, future)
        except Exception as error:  # noqa: BLE001 - who waits must be told
            self._fail(future, error)

    def _resolve(self, wanted: Wanted | WantedMerge, future: Future[Adapter]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            adapter = self._load(wanted)
        except Exception as error:  # noqa: BLE001 - who waits must be told
            future.set_exception(error)
        else:
            future.set_result(adapter)

    def _fail(self, future: Future[Adapter], error: Exception) -> None:
        if future.set_running_or_notify_cancel():
            future.set_exception(error)

    def _at_hand(self, wanted: Wanted | WantedMerge) -> bool:
        parts = wanted.parts if isinstance(wanted, WantedMerge) else (wanted,)
        return all(self._known(p) or self.catalog.at_hand(self.catalog.find(p)) for p in parts)

    def _load(self, wanted: Wanted | WantedMerge) -> Adapter:
        known = self._known(wanted)  # loaded while this waited for its thread
        if known is not None:
            return known
        if isinstance(wanted, WantedMerge):
            # Under their names in this merge: a version may be registered under several.
            parts = [replace(self._load(p), adapter_id=p.adapter_id) for p in wanted.parts]
            with self._reading:
                merged = merge(wanted.adapter_id, parts, wanted.spec)
            self._keep(wanted, _Held(merged, None))
            return merged
        entry = self.catalog.find(wanted)
        key = _key(entry, wanted)
        known = self._at(key)
        return known if known is not None else self._read(key, entry)

    def _read(self, key: Key, entry: Entry) -> Adapter:
        signature = _signature(Path(entry.location.place)) if entry.in_place else None
        self._setbacks.check(entry, signature)
        try:
            with self.catalog.hold(entry) as folder:
                if entry.in_place:
                    signature = _signature(folder)
                version = version_of(folder)  # reads all of a slow disk, which others need not wait
                _check_version(version, entry)
                with self._reading:
                    known = self._at(key)  # loaded while this waited for its turn
                    if known is not None:
                        return known
                    adapter = read_adapter(entry.adapter_id, folder, self._target, version)
        except (InvalidAdapter, AdapterUnavailable) as error:
            self._setbacks.note(entry, signature, error)
            raise
        self._keep(key, _Held(adapter, entry, signature))
        self._setbacks.forget(entry)
        return adapter

    def _preload(self) -> None:
        pinned = [Wanted(e.tenant, e.adapter_id, e.version) for e in self.catalog.pinned()]
        for wanted in pinned + [Wanted("", name) for name in self.catalog.configured()]:
            if self.nbytes >= self._capacity or self.catalog.stop.is_set():
                return
            try:
                self._load(wanted)
            except Stopped:
                return
            except LoraBatchError as error:
                log.warning("adapter refused", adapter_id=wanted.adapter_id, reason=str(error))
            except Exception:
                log.exception("adapter not loaded", adapter_id=wanted.adapter_id)

    # -- what is in memory -------------------------------------------------------

    def _known(self, wanted: Wanted | WantedMerge) -> Adapter | None:
        """The adapter if it is in memory and its files are as they were."""
        if isinstance(wanted, Wanted):
            if wanted.version is not None:
                return self._at(wanted.version)
            return self._at(("", wanted.adapter_id))
        return self._at(wanted) if all(p.version or self._known(p) for p in wanted.parts) else None

    def _at(self, key: Key) -> Adapter | None:
        with self._lock:
            held = self._held.get(key)
        if held is None or not held.is_current:
            return None
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
        return held.adapter

    def _keep(self, key: Key, held: _Held) -> None:
        full = self.nbytes + held.adapter.nbytes > self._capacity
        pinned = self.catalog.pinned_versions() if full else set()
        with self._lock:
            before = self._held.get(key)
            self._held[key] = held
            self._held.move_to_end(key)
            if before is not None:  # its files changed, and merges were made of them
                for stale in [k for k in self._held if isinstance(k, WantedMerge)]:
                    if any(_key_of(part) == key for part in stale.parts):
                        del self._held[stale]
            self._evict({key, *pinned})

    def _evict(self, stay: Set[Key]) -> None:
        over = self._nbytes() - self._capacity
        for key in list(self._held):
            if over <= 0:
                return
            if key not in stay:
                over -= self._held.pop(key).adapter.nbytes

    def _nbytes(self) -> int:
        return sum(held.adapter.nbytes for held in self._held.values())


def _check_version(version: str, entry: Entry) -> None:
    if entry.version not in (None, version):
        raise InvalidAdapter(
            f"adapter {entry.adapter_id!r}: its files are of version {version[:12]} now, "
            f"wanted {str(entry.version)[:12]}; register it anew"
        )


def _key(entry: Entry, wanted: Wanted) -> Key:
    return entry.version or ("", wanted.adapter_id)


def _key_of(wanted: Wanted) -> Key:
    return wanted.version or ("", wanted.adapter_id)


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
