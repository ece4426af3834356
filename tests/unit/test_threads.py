"""Only the engine's thread computes with several threads, whoever loads what meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorabatch import Job
from lorabatch_worker.scheduler import Chunk
from lorabatch_worker.threads import Daemons, compute_with
from tests.desk import WAIT_S, Desk, engine_for


def in_thread(call: Callable[[], None]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join(WAIT_S)


def test_a_thread_keeps_its_number_whatever_others_set() -> None:
    counts: list[int] = []

    def mine() -> None:
        compute_with(3)
        in_thread(lambda: compute_with(1))
        counts.append(torch.get_num_threads())

    in_thread(mine)
    assert counts == [3]


def test_the_engine_computes_with_its_threads_after_adapters_were_loaded(
    tiny_folder: Path,
    tiny_adapters: dict[str, Path],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapters = ",".join(f"{name}={path}" for name, path in tiny_adapters.items())
    engine = engine_for(tiny_folder, home, adapters=adapters, threads=3)
    counts: list[int] = []
    step = engine._step

    def watched(chunks: list[Chunk]) -> None:
        counts.append(torch.get_num_threads())
        step(chunks)

    monkeypatch.setattr(engine, "_step", watched)
    loads: list[int] = []
    load = engine.store._load

    def loading(adapter_id: str) -> object:
        loads.append(torch.get_num_threads())
        return load(adapter_id)

    monkeypatch.setattr(engine.store, "_load", loading)
    desk = Desk(engine)
    sampling = {"max_new_tokens": 4}
    jobs = [Job(prompt="The", adapter_id=n, sampling_params=sampling) for n in tiny_adapters]
    assert {r.error for r in desk.run(*jobs).values()} == {None}
    assert set(counts) == {3}
    assert set(loads) == {1}
    assert desk.engine.drain(WAIT_S) == []


def test_daemons_run_what_they_are_given_until_they_are_closed() -> None:
    pool = Daemons(2, "test")
    hang, seen = threading.Event(), threading.Semaphore(0)
    pool.submit(lambda: seen.release() if hang.wait(WAIT_S) else None)
    for _ in range(3):
        pool.submit(seen.release)
    for _ in range(3):
        assert seen.acquire(timeout=WAIT_S), "one that hangs leaves the other"
    assert not seen.acquire(blocking=False)
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(seen.release)
    hang.set()
    assert seen.acquire(timeout=WAIT_S)


def test_what_has_not_begun_when_daemons_are_closed_never_does() -> None:
    pool = Daemons(1, "test")
    begun, hang, ran = threading.Event(), threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        hang.wait(WAIT_S)

    pool.submit(slow)
    pool.submit(ran.set)
    assert begun.wait(WAIT_S)
    pool.close()
    hang.set()
    for thread in threading.enumerate():
        if thread.name == "test-0":
            thread.join(WAIT_S)
    assert not ran.is_set()
