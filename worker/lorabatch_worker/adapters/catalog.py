"""Which files an adapter's name stands for, and where they are on this machine.

A job that is bound to a version gets that one of the registry. Any other name is one of
LORABATCH_ADAPTERS, a folder in `adapters/` of the data folder, or registered by now; nothing else
can be asked for: an unknown name is an error of that job, never the base model and never a
download. Local folders are read where they are, and may change; what comes from elsewhere is
fetched into the disk cache, once for all workers of a data folder.

Everything here may take long. Raises UnknownAdapter, AdapterUnavailable, InvalidAdapter, and
Stopped when the worker stops; an outage of the database is waited out.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import structlog

from lorabatch.errors import AdapterUnavailable, InvalidAdapter, LoraBatchError, UnknownAdapter
from lorabatch.location import Location
from lorabatch.registry import SHARED, Fault, Registered, Registry
from lorabatch.settings import Settings
from lorabatch_worker.adapters.disk_cache import DiskCache
from lorabatch_worker.adapters.sources import Fetcher
from lorabatch_worker.adapters.wanted import Wanted
from lorabatch_worker.adapters.weights import CONFIG, FILES
from lorabatch_worker.retry import Stopped, until_it_works

__all__ = ["AdapterCatalog", "Entry"]

log = structlog.get_logger(__name__)
T = TypeVar("T")

PINNED_FOR_S = 5.0


@dataclass(frozen=True)
class Entry:
    """An adapter by name. `version` None: whatever is at its location. `tenant`: whose it is."""

    adapter_id: str
    location: Location
    version: str | None = None
    tenant: str = SHARED
    fault: Fault | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """As the registry's; without a version it is this worker's own."""
        return self.tenant, self.adapter_id, self.version or ""

    @property
    def in_place(self) -> bool:
        """Whether its files are read where they are, and may change."""
        return self.version is None and self.location.kind == "folder"


class AdapterCatalog:
    """Names of adapters, and the folder that each one's files are in. For many threads."""

    def __init__(self, settings: Settings, registry: Registry | None = None) -> None:
        self._settings = settings
        self._registry = registry
        self._root = settings.home / "adapters"
        # Now, so that a folder that goes away later is not looked for on the Hub.
        self._sources = {source.name: source.where for source in settings.adapters}
        self._fetched: dict[str, str] = {}  # versions of configured names
        self._pinned: tuple[float, set[str]] = -PINNED_FOR_S, set()
        self.stop = threading.Event()

    def configured(self) -> list[str]:
        """Names that need no registry."""
        return self._settings.configured_adapters

    def pinned(self) -> list[Registered]:
        """Registered adapters that are to be kept at hand."""
        return [entry for entry in self._ask(lambda r: r.names()) or () if entry.pinned]

    def pinned_versions(self) -> set[str]:
        """As they were a moment ago: asked for whenever room is made."""
        asked_s, found = self._pinned
        if time.monotonic() > asked_s + PINNED_FOR_S:
            found = self._ask(lambda registry: registry.pinned_versions()) or set()
            self._pinned = time.monotonic(), found
        return found

    def find(self, wanted: Wanted) -> Entry:
        """What the name stands for to this tenant."""
        tenant, name, version = wanted.tenant, wanted.adapter_id, wanted.version
        if version is None:
            location = self._sources.get(name)
            folder = None if location else self._in_root(name)
            if folder is not None:
                location = Location("folder", str(folder))
            if location is not None:
                return Entry(name, location)
        entry = self._ask(lambda registry: registry.find(tenant, name, version))
        if entry is None:
            raise self._unknown(wanted)
        where = Location.parse(entry.location)
        return Entry(name, where, entry.version, entry.tenant, entry.fault)

    def at_hand(self, entry: Entry) -> bool:
        """Whether nothing has to be fetched for it."""
        if entry.location.kind == "folder":
            return True
        version = entry.version or self._fetched.get(entry.adapter_id)
        return version is not None and self._disk.get(version) is not None

    def was_fetched(self, wanted: Wanted) -> bool:
        """Whether the disk cache has it; asks nobody."""
        version = wanted.version or self._fetched.get(wanted.adapter_id)
        return version is not None and self._disk.has(version)

    @contextlib.contextmanager
    def hold(self, entry: Entry) -> Iterator[Path]:
        """The folder with its files, fetched if need be; they stay inside the block."""
        with contextlib.ExitStack() as held:
            try:
                folder = self._hold(entry, held)
            except LoraBatchError as error:
                if self.stop.is_set():
                    raise Stopped(entry.adapter_id) from None
                who = {"adapter_id": entry.adapter_id, "tenant": entry.tenant}
                log.warning("adapter not to be had", **who, reason=str(error))
                raise type(error)(f"adapter {entry.adapter_id!r}: {error.public}") from None
            yield folder

    def set_aside(self, entry: Entry, error: LoraBatchError) -> None:
        """Let no worker try this version again for a while."""
        self._ask(lambda registry: registry.set_aside(entry.key, error.code, str(error)))

    def forgive(self, entry: Entry) -> None:
        self._ask(lambda registry: registry.forgive(entry.key))

    def close(self) -> None:
        """End every wait."""
        self.stop.set()

    # -- inside ----------------------------------------------------------------

    def _hold(self, entry: Entry, held: contextlib.ExitStack) -> Path:
        if entry.location.kind == "folder":
            folder = Path(entry.location.place)
            if not folder.is_dir():
                where = "LORABATCH_ADAPTERS" if entry.in_place else "LORABATCH_ADAPTER_STORE"
                raise AdapterUnavailable(f"its folder is not there; check {where}")
            if entry.in_place:
                self._check_roots(folder)
            return folder
        for fetched in (False, True, True):  # what was fetched may be evicted before it is held
            if fetched:
                self._fetch(entry)
            version = entry.version or self._fetched.get(entry.adapter_id)
            found = version and held.enter_context(self._disk.hold(version))
            if found:
                return found
        raise AdapterUnavailable(
            "others needed its room in the disk cache at once; raise LORABATCH_ADAPTER_DISK_BYTES"
        )

    def _check_roots(self, folder: Path) -> None:
        """As Fetcher does for what it copies."""
        roots = [root for root in (*self._settings.adapter_roots, self._root) if root.exists()]
        paths = [path.resolve() for path in (folder, *(folder / name for name in FILES))]
        if self._settings.adapter_roots and not any(
            all(path.is_relative_to(root.resolve()) for path in paths) for root in roots
        ):
            raise InvalidAdapter("its folder or a file of it is outside LORABATCH_ADAPTER_ROOTS")

    def _fetch(self, entry: Entry) -> None:
        try:
            location = self._fetcher.pin(entry.location, entry.tenant)
        except AdapterUnavailable as error:
            version = None if entry.version else self._disk.last_at(str(entry.location))
            if version is None:
                raise
            log.warning("source is away: what came last is used", reason=str(error))
        else:

            def fill(folder: Path) -> None:
                self._fetcher.fetch(location, entry.tenant, folder)

            version, _ = self._disk.put(entry.version, fill, str(location))
            self._disk.note_at(str(entry.location), version)
        if entry.version is None:
            self._fetched[entry.adapter_id] = version

    @cached_property
    def _fetcher(self) -> Fetcher:
        return Fetcher(self._settings, self.stop)

    @cached_property
    def _disk(self) -> DiskCache:
        settings = self._settings
        root = settings.home / "adapter-cache"
        return DiskCache(
            root,
            settings.adapter_disk_bytes,
            self.pinned_versions,
            self.stop,
            settings.adapter_fetch_timeout_s,
        )

    def _in_root(self, adapter_id: str) -> Path | None:
        folder = (self._root / adapter_id).resolve()
        plain = Path(adapter_id).name == adapter_id
        inside = plain and folder.parent == self._root.resolve()
        return folder if inside and (folder / CONFIG).is_file() else None

    def _ask(self, call: Callable[[Registry], T]) -> T | None:
        registry = self._registry
        if registry is None:
            return None
        return until_it_works("ask for an adapter", self.stop, lambda: call(registry))

    def _unknown(self, wanted: Wanted) -> UnknownAdapter:
        if wanted.version is not None:
            return UnknownAdapter(
                f"adapter {wanted.adapter_id!r}: version {wanted.version[:12]}, which the job was "
                "accepted for, is not registered any more"
            )
        mine = self._ask(lambda registry: registry.names(wanted.tenant)) or ()
        known = sorted({*self.configured(), *(entry.adapter_id for entry in mine)})
        return UnknownAdapter(
            f"adapter {wanted.adapter_id!r}: not known to this worker (known to tenant "
            f"{wanted.tenant!r}: {', '.join(known) or 'none'}); register it with `lorabatch "
            "adapters add` or add it to LORABATCH_ADAPTERS"
        )
