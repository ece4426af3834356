"""Adapters in host memory: loaded on threads of their own, kept least recently used.

Nothing that the engine's step loop calls here waits: `Future.result` of what is done, `set_aside`.
One adapter that is slow to come delays nobody else's jobs. A local folder whose files changed is
read anew and gets a new version; sequences keep the adapter object they were given. An adapter that
could not be used is set aside (setbacks.py): its jobs fail at once until it is tried again. Merges
are kept like adapters, as long as what they were made of is wanted in the same versions.
"""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from pathlib import Path

import structlog

from lorabatch.errors import InvalidAdapter, LoraBatchError
from lorabatch_worker.adapters.catalog import AdapterCatalog, Entry
from lorabatch_worker.adapters.host_cache import HostCache, Key, Origin, Signature, signature_of
from lorabatch_worker.adapters.merge import merge, merged_version
from lorabatch_worker.adapters.setbacks import Setbacks, check_fault
from lorabatch_worker.adapters.wanted import Wanted, WantedMerge
from lorabatch_worker.adapters.weights import Adapter, AdapterTarget, read_adapter, version_of
from lorabatch_worker.retry import Stopped
from lorabatch_worker.threads import Daemons, compute_beside

__all__ = ["AdapterStore", "Loading"]

log = structlog.get_logger(__name__)

LOADERS = 8
FETCHERS = 16  # of each kind of source: a dead one takes its own threads
READS = 3
PRELOAD_S = 5.0
LOOK_S = 0.05
LOADING = "loading"


class _Refused(Exception):
    """An adapter's files hold what cannot be used; that is noted already."""

    def __init__(self, error: InvalidAdapter) -> None:
        super().__init__(str(error))
        self.error = error


class Loading(Future[Adapter]):
    """An adapter that is here or comes. `fetching`: over a network, which may take minutes."""

    fetching = False


class AdapterStore:
    """Loads each adapter once, however many jobs ask for it at the same time."""

    def __init__(self, catalog: AdapterCatalog, target: AdapterTarget, capacity_bytes: int) -> None:
        self.catalog = catalog
        self._target = target
        self._memory = HostCache(capacity_bytes, catalog.pinned_versions)
        self._loading: dict[Wanted | WantedMerge, Loading] = {}
        self._warmed: dict[Wanted, str] = {}
        self._setbacks = Setbacks()
        self._lock = threading.Lock()
        self._reading = threading.Lock()  # one at a time: the engine's threads need the cores
        self._pool = ThreadPoolExecutor(LOADERS, "adapter-load", initializer=compute_beside)
        self._fetchers = {kind: Daemons(FETCHERS, f"fetch-{kind}") for kind in ("hub", "s3")}

    def request(self, wanted: Wanted | WantedMerge) -> Loading:
        """The adapter, now or when it is loaded; its failure is the future's exception."""
        known = self.known(wanted)
        if known is not None:  # at once: all threads may be busy with slow ones
            ready = Loading()
            ready.set_result(known)
            return ready
        with self._lock:
            future = self._loading.get(wanted)
            if future is None:
                future = self._loading[wanted] = Loading()
                future.add_done_callback(lambda _: self._loading.pop(wanted, None))
                try:
                    self._pool.submit(self._answer, wanted, future)
                except RuntimeError as error:  # no more threads, or the worker stops
                    self._fail(future, error)
            return future

    def warm(self, wanted: Wanted) -> str:
        """Load it ahead of its jobs: "loaded", "loading", or why not, which is said once."""
        said = self._warmed.pop(wanted, None)
        if said is None:
            self._warmed[wanted] = LOADING

            def tell(future: Future[Adapter]) -> None:
                error = None if future.cancelled() else future.exception()
                self._warmed[wanted] = "loaded" if error is None else str(error)

            self.request(wanted).add_done_callback(tell)
            said = self._warmed.pop(wanted)
        if said == LOADING:
            self._warmed.setdefault(wanted, LOADING)
        return said

    def preload(self) -> None:
        """Load what is configured and what is pinned, one after the other, as far as memory goes;
        log what cannot be used."""
        self._pool.submit(self._preload)

    def set_aside(self, adapter: Adapter, reason: str, here_only: bool = False) -> None:
        """It was loaded and did harm: forget it, and let nobody try it again for a while, nor other
        workers. Waits for nothing."""
        origin = self._memory.drop(adapter)
        entry, error = origin.entry, InvalidAdapter(f"adapter {adapter.adapter_id!r}: {reason}")
        key = origin.key if entry is None else entry.key
        self._setbacks.note(key, origin.signature, str(error))
        if not here_only and entry is not None and entry.version is not None:
            with contextlib.suppress(RuntimeError):  # the worker stops
                self._pool.submit(self._tell, entry, error)

    def held(self, wanted: Wanted) -> Adapter | None:
        """The adapter if it is in memory; its files are not looked at."""
        return self._memory.held(_key(wanted.version, wanted))

    @property
    def loaded(self) -> list[str]:
        """Names in host memory, least recently used first."""
        return self._memory.names

    @property
    def nbytes(self) -> int:
        """Of the adapters in host memory."""
        return self._memory.nbytes

    def close(self) -> None:
        self.catalog.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for fetchers in self._fetchers.values():
            fetchers.close()
        for future in list(self._loading.values()):
            future.cancel()

    # -- on the store's threads --------------------------------------------------

    def _answer(self, wanted: Wanted | WantedMerge, future: Loading) -> None:
        """On a thread that fetches if need be: those of a dead source are then all that wait."""
        try:
            source = self._to_fetch_from(wanted)
            if source is not None:
                future.fetching = True
                self._fetchers[source].submit(lambda: self._resolve(wanted, future))
                return
        except Exception as error:  # noqa: BLE001 - who waits must be told
            self._fail(future, error)
            return
        self._resolve(wanted, future)

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
        """If the worker stops, that is why, and the jobs are handed back."""
        stopped = Stopped("load an adapter") if self.catalog.stop.is_set() else error
        if future.set_running_or_notify_cancel():
            future.set_exception(stopped)

    def _tell(self, entry: Entry, error: InvalidAdapter) -> None:
        self.catalog.set_aside(entry, error)
        # The registry has it now, and somebody may say otherwise there.
        self._setbacks.forget(entry.key)

    def _to_fetch_from(self, wanted: Wanted | WantedMerge) -> str | None:
        """The kind of source, the first one of a merge; None if all of it is on this machine."""
        parts = wanted.parts if isinstance(wanted, WantedMerge) else (wanted,)
        entries = (self.catalog.find(part) for part in parts if not self.known(part))
        return next((e.location.kind for e in entries if not self.catalog.at_hand(e)), None)

    def _load(self, wanted: Wanted | WantedMerge) -> Adapter:
        known = self.known(wanted)  # loaded while this waited for its thread
        if known is not None:
            return known
        if isinstance(wanted, WantedMerge):
            return self._merge(wanted)
        entry = self.catalog.find(wanted)
        key = _key(entry.version, wanted)
        known = self._memory.get(key)
        return known if known is not None else self._read(key, entry)

    def _merge(self, wanted: WantedMerge) -> Adapter:
        self._setbacks.check(wanted)
        # Under their names in this merge: a version may be registered under several.
        parts = [replace(self._load(p), adapter_id=p.adapter_id) for p in wanted.parts]
        try:
            with self._reading:
                merged = merge(wanted.adapter_id, parts, wanted.spec)
        except InvalidAdapter as error:
            self._setbacks.note(wanted, None, str(error))
            raise
        self._memory.put(merged, Origin(wanted))
        return merged

    def _read(self, key: Key, entry: Entry) -> Adapter:
        signature = signature_of(Path(entry.location.place)) if entry.in_place else None
        check_fault(entry)
        self._setbacks.check(entry.key, signature)
        try:
            with self.catalog.hold(entry) as folder:
                for _ in range(READS):  # again, while somebody writes into a local folder
                    signature = signature_of(folder) if entry.in_place else None
                    adapter = self._read_from(folder, key, entry, signature)
                    if not entry.in_place or signature_of(folder) == signature:
                        break
        except _Refused as refused:
            raise refused.error from None
        except Stopped:
            raise
        except Exception as error:  # of its place or of this machine: other workers may have it
            what = str(error) if isinstance(error, LoraBatchError) else type(error).__name__
            self._setbacks.note(entry.key, signature, what)
            raise
        self._memory.put(adapter, Origin(key, entry, signature))
        self._setbacks.forget(entry.key)
        if entry.fault is not None:
            self.catalog.forgive(entry)
        return adapter

    def _read_from(
        self, folder: Path, key: Key, entry: Entry, signature: Signature | None
    ) -> Adapter:
        # A folder that is named by its version was checked when it was put there. Otherwise all of
        # it is read here, on however slow a disk, which others need not wait for.
        version = folder.name if folder.name == entry.version else version_of(folder)
        if entry.version not in (None, version):
            raise InvalidAdapter(
                f"adapter {entry.adapter_id!r}: its files are of version {version[:12]} now, "
                f"wanted {str(entry.version)[:12]}; register it anew"
            )
        with self._reading:
            known = self._memory.get(key)  # loaded while this waited for its turn
            if known is not None:
                return known
            try:
                return read_adapter(entry.adapter_id, folder, self._target, version)
            except InvalidAdapter as error:
                wrong = error
        if entry.version is None:
            self._setbacks.note(entry.key, signature, str(wrong))
        else:
            self.catalog.set_aside(entry, wrong)
        raise _Refused(wrong)

    def _preload(self) -> None:
        pinned = [Wanted(e.tenant, e.adapter_id, e.version) for e in self.catalog.pinned()]
        for wanted in pinned + [Wanted("", name) for name in self.catalog.configured()]:
            if self.nbytes >= self._memory.capacity_bytes or self.catalog.stop.is_set():
                return
            with contextlib.suppress(FutureTimeout):  # the next ones need not wait for it
                error = self._came(self.request(wanted), PRELOAD_S)
                if isinstance(error, LoraBatchError):
                    log.warning("adapter refused", adapter_id=wanted.adapter_id, reason=str(error))
                elif error is not None and not isinstance(error, Stopped):
                    log.error("adapter not loaded", adapter_id=wanted.adapter_id, exc_info=error)

    def _came(self, adapter: Loading, wait_s: float) -> BaseException | None:
        """As `exception`, but the wait ends when the worker stops."""
        end_s = time.monotonic() + wait_s
        while not (adapter.done() or self.catalog.stop.is_set() or time.monotonic() > end_s):
            self.catalog.stop.wait(LOOK_S)
        return adapter.exception(0)

    # -- what is in memory -------------------------------------------------------

    def known(self, wanted: Wanted | WantedMerge) -> Adapter | None:
        """The adapter if it is in memory and its files are as they were."""
        if isinstance(wanted, Wanted):
            return self._memory.get(_key(wanted.version, wanted))
        merged = self._memory.get(wanted)
        if merged is None or all(part.version for part in wanted.parts):
            return merged
        parts = [self.known(part) for part in wanted.parts]  # of names that may mean others now
        current = [part for part in parts if part is not None]
        same = len(current) == len(parts) and merged_version(current, wanted.spec) == merged.version
        return merged if same else None


def _key(version: str | None, wanted: Wanted) -> Key:
    return version or ("", wanted.adapter_id)
