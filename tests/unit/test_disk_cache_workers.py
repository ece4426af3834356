"""The disk cache of several threads and workers at once, and of one that was killed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lorabatch.errors import AdapterUnavailable
from lorabatch_worker.adapters.disk_cache import DiskCache
from lorabatch_worker.adapters.weights import version_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SIZE = 1000
WAIT_S = 60.0


def fill_with_a(folder: Path) -> None:
    (folder / CONFIG).write_text("{}")
    (folder / WEIGHTS).write_text("a")


def kept(root: Path) -> set[str]:
    return {entry.name for entry in root.iterdir() if not entry.name.startswith(".")}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_threads_fill_one_at_a_time(root: Path) -> None:
    cache = DiskCache(root, SIZE)
    inside, most, done = [], [], []

    def fill(folder: Path) -> None:
        inside.append(1)
        most.append(len(inside))
        fill_with_a(folder)
        inside.pop()

    threads = [
        threading.Thread(target=lambda: done.append(cache.put(None, fill, "key"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert set(most) == {1}
    assert len(done) == 8
    assert kept(root) == {done[0][0]}


def test_a_worker_that_stops_does_not_wait_for_another(root: Path) -> None:
    stop, begun, go_on = threading.Event(), threading.Event(), threading.Event()

    def slow(folder: Path) -> None:
        begun.set()
        assert go_on.wait(WAIT_S)
        fill_with_a(folder)

    other = threading.Thread(target=lambda: DiskCache(root, SIZE).put(None, slow, "key"))
    other.start()
    assert begun.wait(WAIT_S)
    stop.set()
    with pytest.raises(AdapterUnavailable, match="the worker stops"):
        DiskCache(root, SIZE, stop=stop).put(None, fill_with_a, "key")
    go_on.set()
    other.join(WAIT_S)
    assert len(kept(root)) == 1


WORKER = """
import os, sys, time
from pathlib import Path
from lorabatch_worker.adapters.disk_cache import DiskCache
root, what = Path(sys.argv[1]), sys.argv[2]
cache = DiskCache(root, 2500)
def fill(folder, content):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        with (folder / name).open("w") as file:
            for piece in range(10):
                file.write((content + str(piece)).ljust(50, "."))
                file.flush()
                time.sleep(0.001)
def die(folder):
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_text("half")
    os.kill(os.getpid(), 9)
if what == "die":
    cache.put(None, die, "key")
print("ready", flush=True)
sys.stdin.readline()
if what == "same":
    print(cache.put(None, lambda folder: fill(folder, "a"), "key")[0], flush=True)
else:
    for i in range(40):
        content = "abcde"[(i * int(what)) % 5]
        version, folder = cache.put(None, lambda folder: fill(folder, content), content)
        with cache.hold(version) as held:
            if held is not None:
                files = [(held / name).read_text() for name in sorted(os.listdir(held))]
                assert [len(text) for text in files] == [500, 500], files
    print("whole", flush=True)
"""


def start(root: Path, what: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", WORKER, str(root), what]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_together(root: Path, *whats: str) -> list[str]:
    """What each worker says at last; they begin when all are ready."""
    workers = [start(root, what) for what in whats]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n", worker.communicate(timeout=WAIT_S)
    ended = []
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    for worker in workers:
        out, err = worker.communicate(timeout=WAIT_S)
        assert (worker.returncode, err) == (0, "")
        ended.append(out.strip())
    return ended


def test_two_processes_that_fetch_the_same_end_with_one_copy(root: Path) -> None:
    first, second = run_together(root, "same", "same")
    assert first == second
    assert kept(root) == {first}
    assert version_of(root / first) == first


def test_processes_that_push_each_other_out_see_whole_folders_only(root: Path) -> None:
    assert run_together(root, "1", "2", "3") == ["whole"] * 3
    assert len(kept(root)) == 2
    assert all(version_of(root / version) == version for version in kept(root))
    assert not list((root / ".trash").iterdir())
    assert not list((root / ".partial").glob("*[!k]"))


def test_a_crash_leaves_nothing_visible_and_is_gone_on_from(root: Path) -> None:
    crashed = start(root, "die")
    crashed.communicate(timeout=WAIT_S)
    assert crashed.returncode == -9
    assert not kept(root)

    def rest(folder: Path) -> None:
        assert (folder / WEIGHTS).read_text() == "half"
        (folder / WEIGHTS).write_text("half and the other half")

    version, folder = DiskCache(root, 2500).put(None, rest, "key")
    assert kept(root) == {version}
    assert (folder / WEIGHTS).read_text() == "half and the other half"


def test_nobody_waits_for_ever_for_one_who_fetches(root: Path) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def slow(folder: Path) -> None:
        inside.set()
        assert go_on.wait(WAIT_S)
        fill_with_a(folder)

    first = threading.Thread(target=lambda: DiskCache(root, SIZE).put(None, slow, "key"))
    first.start()
    assert inside.wait(WAIT_S)
    (lock,) = (root / ".partial").glob("*.lock")
    os.utime(lock, (time.time() - 1000,) * 2)
    with pytest.raises(AdapterUnavailable, match="for 300 s without an end"):
        DiskCache(root, SIZE, wait_s=300).put(None, fill_with_a, "key")
    go_on.set()
    first.join(WAIT_S)
    assert len(kept(root)) == 1
