"""Fetched adapters on disk, one folder a version, shared by all workers of a data folder.

    root/<version>/        an adapter's files; the folder's time is when it was last used
    root/.partial/<key>/   one that is being filled, with <key>.lock beside it; survives a crash
    root/.trash/           on its way out
    root/.places/          which version was last seen where
    root/.lock             held while folders are put in place or taken out, not while one is filled

A version is the sha256 of the files (`version_of`), so a folder never changes once it is in place.
Beyond the capacity (bytes, of whole versions) the least recently used go, but neither the one just
put, nor pinned ones, nor those in use by any worker (`hold`). Raises InvalidAdapter (the files are
not of the version asked for), AdapterUnavailable (the worker stops, the disk fails, or another has
been filling it for too long); what else
`fill` raises passes through and leaves what it has filled. Locks are flock's: on a network file
system that lacks it, give each machine a folder of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from lorabatch.errors import AdapterUnavailable, InvalidAdapter
from lorabatch_worker.adapters.weights import CONFIG, version_of

__all__ = ["DiskCache"]

LEFTOVER_AGE_S = 86_400.0
LOCK_POLL_S = 0.05
SLACK_S = 30.0  # to check and to write what was fetched
VERSION = re.compile("[0-9a-f]{64}")


class DiskCache:
    """Safe for many threads and processes. `pinned` gives versions that stay; `stop` ends waits;
    `wait_s` is how long somebody may take to fill a folder that others wait for."""

    def __init__(
        self,
        root: Path,
        capacity_bytes: int,
        pinned: Callable[[], set[str]] = set,
        stop: threading.Event | None = None,
        wait_s: float = math.inf,
    ) -> None:
        self._root = root
        self._capacity = capacity_bytes
        self._pinned = pinned
        self._stop = stop or threading.Event()
        self._wait_s = wait_s
        self._partial, self._trash = root / ".partial", root / ".trash"
        self._places, self._lock = root / ".places", root / ".lock"
        for folder in (self._partial, self._trash, self._places):
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, version: str) -> Path | None:
        """The version's folder, used now; None if it is not here. It may go as soon as others need
        the room: read it inside `hold`."""
        if not VERSION.fullmatch(version):
            return None
        folder = self._root / version
        try:
            _touch(folder)
        except FileNotFoundError:
            return None
        return folder

    def has(self, version: str) -> bool:
        """Whether it is here, which is no use of it."""
        return VERSION.fullmatch(version) is not None and (self._root / version).is_dir()

    @contextlib.contextmanager
    def hold(self, version: str) -> Iterator[Path | None]:
        """As `get`; no worker takes the folder out inside the block."""
        folder = self.get(version)
        try:
            file = folder and (folder / CONFIG).open("rb")
        except FileNotFoundError:
            file = None
        if not file:
            yield None
            return
        with file:
            fcntl.flock(file, fcntl.LOCK_SH)
            # It may have been taken out before the lock was there.
            yield folder if _is_at(file.fileno(), self._root / version / CONFIG) else None

    def put(self, version: str | None, fill: Callable[[Path], None], key: str) -> tuple[str, Path]:
        """Have `fill` bring the files into a folder, which holds what came before under this key:
        their version, and where they are now. `version`: what they must be."""
        try:
            placed = self._fill(version, fill, key)
            self._evict(placed[0])
        except OSError as error:
            raise AdapterUnavailable(
                f"the disk cache in {self._root} failed: {error}",
                "the worker's disk cache failed; its log says why",
            ) from error
        return placed

    def _fill(
        self, version: str | None, fill: Callable[[Path], None], key: str
    ) -> tuple[str, Path]:
        partial = self._partial / hashlib.sha256(key.encode()).hexdigest()[:32]
        with self._locked(partial.with_suffix(".lock")):
            known = version and self.get(version)
            if version and known:  # another worker was first
                return version, known
            partial.mkdir(exist_ok=True)
            fill(partial)
            found = version_of(partial)
            if version not in (None, found):
                shutil.rmtree(partial)
                raise InvalidAdapter(
                    f"its files are of version {found}, wanted {version}: they have changed at the "
                    "source; register it anew"
                )
            _to_disk(partial)
            with self._locked(self._lock):
                return found, self._place(partial, found)

    def note_at(self, place: str, version: str) -> None:
        """Remember which version a place, whose content may change, had when it was last seen."""
        name = hashlib.sha256(place.encode()).hexdigest()[:32]
        scratch = self._places / f"{name}.{uuid.uuid4().hex}"
        scratch.write_text(version)
        scratch.replace(self._places / name)

    def last_at(self, place: str) -> str | None:
        """That version, if it is here."""
        path = self._places / hashlib.sha256(place.encode()).hexdigest()[:32]
        version = path.read_text() if path.is_file() else ""
        return version if self.get(version) else None

    def _place(self, partial: Path, version: str) -> Path:
        folder = self._root / version
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(partial)  # the same files came under another key
        _touch(folder)
        return folder

    def _evict(self, just_put: str) -> None:
        stay = {just_put, *self._pinned()}  # may ask a database: not while others wait
        with self._locked(self._lock):
            found = sorted(
                (folder.stat().st_mtime_ns, _size(folder), folder)
                for folder in self._root.iterdir()
                if VERSION.fullmatch(folder.name)
            )
            over = sum(size for _, size, _ in found) - self._capacity
            for _, size, folder in found:
                if over > 0 and folder.name not in stay and self._discard(folder):
                    over -= size
        self._sweep()

    def _discard(self, folder: Path) -> bool:
        """Out of sight at once, whole: whether nobody uses it."""
        with contextlib.ExitStack() as held:
            with contextlib.suppress(FileNotFoundError):
                file = held.enter_context((folder / CONFIG).open("rb"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
            folder.rename(self._trash / f"{folder.name}-{uuid.uuid4().hex}")
        return True

    def _sweep(self) -> None:
        """Delete what is in the trash, of a process that died too, and what nobody goes on with."""
        for folder in self._trash.iterdir():
            shutil.rmtree(folder, ignore_errors=True)
        oldest = time.time() - LEFTOVER_AGE_S
        for lock in self._partial.glob("*.lock"):
            with contextlib.suppress(OSError):
                if lock.stat().st_mtime < oldest:
                    self._forget(lock)

    def _forget(self, lock: Path) -> None:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file.fileno(), lock):
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink()

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Only one thread of one process at a time runs the block; the kernel frees it of the dead.
        Unlike `lorabatch.embedded.file_lock` the wait ends."""
        while True:
            with path.open("ab") as file:
                if _taken(file.fileno()) and _is_at(file.fileno(), path):
                    os.utime(path)
                    yield
                    return
            if self._stop.wait(LOCK_POLL_S):
                raise AdapterUnavailable(f"{path.stem}: the worker stops")
            if path != self._lock and _held_s(path) > self._wait_s + SLACK_S:
                raise AdapterUnavailable(
                    f"others have been fetching it for {self._wait_s:g} s without an end"
                )


def _held_s(lock: Path) -> float:
    """How long whoever has it has had it."""
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _taken(number: int) -> bool:
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(number: int, path: Path) -> bool:
    """Whether the open file is still the one at that path."""
    try:
        return os.path.samestat(os.fstat(number), path.stat())
    except FileNotFoundError:
        return False


def _touch(folder: Path) -> None:
    now = time.time_ns()  # the kernel's own "now" is too coarse to tell two uses apart
    os.utime(folder, ns=(now, now))


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _to_disk(folder: Path) -> None:
    """Else a power cut could leave a version's name with other content."""
    for path in (*folder.iterdir(), folder):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
