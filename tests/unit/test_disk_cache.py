"""The disk cache of one worker: what it keeps, and what goes."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lorabatch.errors import AdapterUnavailable, InvalidAdapter
from lorabatch_worker.adapters import disk_cache
from lorabatch_worker.adapters.disk_cache import DiskCache
from lorabatch_worker.adapters.weights import version_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SIZE = 1000


def filler(content: str, asked: list[str] | None = None) -> Callable[[Path], None]:
    """Fills a folder with SIZE bytes that begin with `content`."""

    def fill(folder: Path) -> None:
        if asked is not None:
            asked.append(content)
        (folder / CONFIG).write_text("{}")
        (folder / WEIGHTS).write_text(content.ljust(SIZE - 2, "."))

    return fill


def put(cache: DiskCache, content: str) -> str:
    return cache.put(None, filler(content), content)[0]


def kept(root: Path) -> set[str]:
    return {entry.name for entry in root.iterdir() if not entry.name.startswith(".")}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cache(root: Path) -> DiskCache:
    """Room for three."""
    return DiskCache(root, 3 * SIZE)


def test_what_is_put_is_found_by_its_version(cache: DiskCache, root: Path) -> None:
    version, folder = cache.put(None, filler("a"), "from here")
    assert folder == root / version
    assert version == version_of(folder)
    assert cache.get(version) == folder
    assert not list((root / ".partial").glob("*[!k]"))


@pytest.mark.parametrize("version", ["0" * 64, "", "..", ".partial", "../cache", "A" * 64])
def test_what_is_not_there_is_not_found(cache: DiskCache, version: str) -> None:
    assert cache.get(version) is None
    with cache.hold(version) as folder:
        assert folder is None


def test_what_a_place_last_had_is_remembered_as_long_as_it_is_here(
    cache: DiskCache, root: Path
) -> None:
    assert cache.last_at("hub:acme/sql") is None
    version = put(cache, "one")
    cache.note_at("hub:acme/sql", version)
    assert DiskCache(root, 1 << 30).last_at("hub:acme/sql") == version
    cache.note_at("hub:acme/sql", "0" * 64)
    assert cache.last_at("hub:acme/sql") is None


def test_what_is_there_is_not_filled_again(cache: DiskCache) -> None:
    version = put(cache, "a")
    asked: list[str] = []
    assert cache.put(version, filler("a", asked), "elsewhere")[0] == version
    assert not asked


def test_the_same_files_from_elsewhere_are_kept_once(cache: DiskCache, root: Path) -> None:
    first = cache.put(None, filler("a"), "here")
    assert cache.put(None, filler("a"), "there") == first
    assert kept(root) == {first[0]}
    assert not list((root / ".partial").glob("*[!k]"))


def test_files_of_another_version_are_refused_and_not_kept(cache: DiskCache, root: Path) -> None:
    found = put(DiskCache(root.with_name("other"), 3 * SIZE), "b")
    wanted = "0" * 64
    with pytest.raises(InvalidAdapter, match=f"of version {found}, wanted {wanted}"):
        cache.put(wanted, filler("b"), "key")
    assert not kept(root)
    assert not list((root / ".partial").glob("*[!k]"))
    assert cache.put(found, filler("b"), "key")[0] == found


def test_what_failed_goes_on_where_it_was(cache: DiskCache, root: Path) -> None:
    def half(folder: Path) -> None:
        (folder / CONFIG).write_text("{}")
        raise AdapterUnavailable("cut")

    def rest(folder: Path) -> None:
        assert (folder / CONFIG).read_text() == "{}"
        (folder / WEIGHTS).write_text("x")

    with pytest.raises(AdapterUnavailable, match="cut"):
        cache.put(None, half, "key")
    assert not kept(root)
    version, folder = cache.put(None, rest, "key")
    assert kept(root) == {version}
    assert (folder / WEIGHTS).read_text() == "x"


def test_a_full_disk_makes_it_unavailable(cache: DiskCache, root: Path) -> None:
    def fill(folder: Path) -> None:
        Path("/dev/full").write_bytes(b"x")

    with pytest.raises(AdapterUnavailable, match=f"cache in {root} failed: .*No space left"):
        cache.put(None, fill, "key")


# -- what goes ----------------------------------------------------------------


def test_least_recently_used_goes_first(cache: DiskCache, root: Path) -> None:
    a, b, c = (put(cache, name) for name in "abc")
    assert kept(root) == {a, b, c}
    cache.get(a)
    d = put(cache, "d")
    assert kept(root) == {c, a, d}
    put(cache, "c")
    e = put(cache, "e")
    assert kept(root) == {c, d, e}
    assert not list((root / ".trash").iterdir())


def test_pinned_ones_stay(root: Path) -> None:
    pinned: set[str] = set()
    cache = DiskCache(root, 2 * SIZE, lambda: pinned)
    a, b = put(cache, "a"), put(cache, "b")
    pinned |= {a, b}
    c = put(cache, "c")
    assert kept(root) == {a, b, c}
    pinned.discard(b)
    d = put(cache, "d")
    assert kept(root) == {a, d}


def test_one_in_use_stays_until_it_is_not(cache: DiskCache, root: Path) -> None:
    a = put(cache, "a")
    with cache.hold(a) as folder, DiskCache(root, 3 * SIZE).hold(a):
        assert folder == root / a
        b, c, d = (put(cache, name) for name in "bcd")
        assert kept(root) == {a, c, d}
        assert b not in kept(root)
    e, f, g = (put(cache, name) for name in "efg")
    assert kept(root) == {e, f, g}


def test_one_larger_than_all_room_is_the_only_one_kept(root: Path) -> None:
    cache = DiskCache(root, SIZE // 2)
    a = put(cache, "a")
    assert kept(root) == {a}
    b = put(cache, "b")
    assert kept(root) == {b}


def test_leftovers_go_when_they_are_old(cache: DiskCache, root: Path) -> None:
    for key in ("old", "new"):
        with pytest.raises(AdapterUnavailable):
            cache.put(None, fail, key)
    old, new = (cache._partial / name for name in partials("old", "new"))
    (root / ".trash" / "of-one-that-died").mkdir()
    before = time.time() - disk_cache.LEFTOVER_AGE_S - 60
    os.utime(old.with_suffix(".lock"), (before, before))
    put(cache, "a")
    assert not old.exists()
    assert not old.with_suffix(".lock").exists()
    assert (new / CONFIG).is_file()
    assert not list((root / ".trash").iterdir())


def partials(*keys: str) -> list[str]:
    return [hashlib.sha256(key.encode()).hexdigest()[:32] for key in keys]


def fail(folder: Path) -> None:
    (folder / CONFIG).write_text("{}")
    raise AdapterUnavailable("cut")
