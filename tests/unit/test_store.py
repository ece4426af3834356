"""Adapters in host memory: one load for many, least recently used, new files, slow ones."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from lorabatch import Settings
from lorabatch.errors import InvalidAdapter, UnknownAdapter
from lorabatch_worker.adapters import store as store_module
from lorabatch_worker.adapters.catalog import AdapterCatalog
from lorabatch_worker.adapters.store import AdapterStore
from lorabatch_worker.adapters.wanted import Wanted
from lorabatch_worker.adapters.weights import Adapter, version_of
from tests.bad_adapters import TARGET, write

WAIT_S = 30.0


class Reads:
    """Stands in for `version_of`, which reads all files of an adapter first: counts, and holds
    those that are told to be slow."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.slow: dict[str, threading.Event] = {}
        self.begun = threading.Semaphore(0)

    def __call__(self, folder: Path) -> str:
        self.names.append(folder.name)
        self.begun.release()
        if folder.name in self.slow:
            assert self.slow[folder.name].wait(WAIT_S)
        return version_of(folder)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    found = Reads()
    monkeypatch.setattr(store_module, "version_of", found)
    yield found
    for event in found.slow.values():
        event.set()


@pytest.fixture
def store(home: Path) -> Iterator[AdapterStore]:
    """Room for any number of small adapters; a, b and c are there."""
    for name in "abc":
        write(home / "adapters" / name, {"lora_alpha": ord(name)})
    made = AdapterStore(AdapterCatalog(Settings.load(home=home)), TARGET, 1 << 30)
    yield made
    made.close()


def got(future: Future[Adapter]) -> Adapter:
    return future.result(WAIT_S)


def test_many_requests_are_one_load(store: AdapterStore, reads: Reads) -> None:
    reads.slow["a"] = threading.Event()
    futures = [store.request(Wanted("default", "a")) for _ in range(50)]
    assert not any(f.done() for f in futures)
    reads.slow["a"].set()
    assert len({id(got(f)) for f in futures}) == 1
    assert got(store.request(Wanted("default", "a"))) is got(futures[0])
    assert reads.names == ["a"]


def test_what_is_in_memory_comes_at_once_though_all_threads_are_busy(
    store: AdapterStore, reads: Reads, home: Path
) -> None:
    got(store.request(Wanted("default", "a")))
    for i in range(store_module.LOADERS + 3):
        write(home / "adapters" / f"slow-{i}")
        reads.slow[f"slow-{i}"] = threading.Event()
        store.request(Wanted("default", f"slow-{i}"))
    future = store.request(Wanted("default", "a"))
    assert future.done()
    assert got(future).adapter_id == "a"


def test_a_slow_adapter_does_not_hold_up_another(store: AdapterStore, reads: Reads) -> None:
    reads.slow["a"] = threading.Event()
    slow = store.request(Wanted("default", "a"))
    assert got(store.request(Wanted("default", "b"))).adapter_id == "b"
    assert not slow.done()
    reads.slow["a"].set()
    assert got(slow).adapter_id == "a"


def test_least_recently_used_goes_when_bytes_run_out(
    home: Path, reads: Reads, store: AdapterStore
) -> None:
    size = got(store.request(Wanted("default", "a"))).nbytes
    small = AdapterStore(store.catalog, TARGET, 2 * size)
    for name in ("a", "b", "a", "c"):
        got(small.request(Wanted("default", name)))
    assert small.loaded == ["a", "c"]
    reads.names.clear()
    got(small.request(Wanted("default", "b")))
    assert reads.names == ["b"]
    assert small.loaded == ["c", "b"]
    small.close()


def test_one_that_is_larger_than_all_room_is_kept_while_it_is_the_newest(
    store: AdapterStore,
) -> None:
    tiny = AdapterStore(store.catalog, TARGET, 1)
    got(tiny.request(Wanted("default", "a")))
    assert tiny.loaded == ["a"]
    got(tiny.request(Wanted("default", "b")))
    assert tiny.loaded == ["b"]
    tiny.close()


def test_changed_files_give_a_new_version(store: AdapterStore, home: Path) -> None:
    first = got(store.request(Wanted("default", "a")))
    path = home / "adapters" / "a" / "adapter_config.json"
    stat = path.stat()
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 64}))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    second = got(store.request(Wanted("default", "a")))
    assert second.version != first.version
    assert {s.scale for s in second.sites.values()} == {16.0}
    assert {s.scale for s in first.sites.values()} == {ord("a") / 4}


def test_an_added_chat_template_gives_a_new_version(store: AdapterStore, home: Path) -> None:
    first = got(store.request(Wanted("default", "a")))
    (home / "adapters" / "a" / "chat_template.jinja").write_text("hello")
    second = got(store.request(Wanted("default", "a")))
    assert (first.chat_template, second.chat_template) == (None, "hello")
    assert second.version != first.version


def test_a_failure_is_that_of_its_adapter_and_is_tried_again(
    store: AdapterStore, home: Path
) -> None:
    write(home / "adapters" / "bad", {"r": 0})
    bad, good, unknown = (store.request(Wanted("default", n)) for n in ("bad", "b", "nobody"))
    assert isinstance(bad.exception(WAIT_S), InvalidAdapter)
    assert isinstance(unknown.exception(WAIT_S), UnknownAdapter)
    assert got(good).adapter_id == "b"
    write(home / "adapters" / "bad")
    assert got(store.request(Wanted("default", "bad"))).rank_rows == 4


def test_a_folder_that_is_gone_is_not_served_from_memory(store: AdapterStore, home: Path) -> None:
    got(store.request(Wanted("default", "a")))
    os.rename(home / "adapters" / "a", home / "gone")
    assert isinstance(store.request(Wanted("default", "a")).exception(WAIT_S), UnknownAdapter)


def test_closing_cancels_what_has_not_begun(store: AdapterStore, reads: Reads, home: Path) -> None:
    futures = []
    for i in range(store_module.LOADERS + 1):
        write(home / "adapters" / f"slow-{i}")
        reads.slow[f"slow-{i}"] = threading.Event()
        futures.append(store.request(Wanted("default", f"slow-{i}")))
    for _ in range(store_module.LOADERS):
        assert reads.begun.acquire(timeout=WAIT_S)
    store.close()
    assert futures[-1].cancelled()
    assert not any(f.cancelled() for f in futures[:-1])
