"""Adapters that bring weights of their own to a device: what happens when it has no memory left."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from lorabatch_worker.adapters.slots import AdapterSlots
from lorabatch_worker.scheduler import Scheduler
from tests.scheduling import play, run, scheduler, sequence


class Ends:
    """Memory for the own weights of `room` adapters."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.held: set[int] = set()
        self.tries = 0

    def load(self, slot: int, change: object) -> None:
        self.tries += 1
        if len(self.held) >= self.room:
            raise RuntimeError("CUDA error: out of memory")
        self.held.add(slot)

    def drop(self, slot: int) -> None:
        self.held.discard(slot)

    def changes(self, slot: int) -> bool:
        return slot in self.held


def with_room(room: int, **sizes: Any) -> tuple[Scheduler, Ends]:
    s, ends = scheduler(slots=4, **sizes), Ends(room)
    held: Any = ends
    s.slots = AdapterSlots({}, 4, None, held)
    return s, ends


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: now.s)
    return now


def test_an_adapter_waits_for_the_memory_of_those_that_run() -> None:
    s, ends = with_room(1)
    for name in "abc":
        s.add(sequence(name, new=3, name=name))
    assert run(s) == ["a", "b", "c"]
    assert not s.refused
    assert (ends.tries - s.slots.loads, len(ends.held)) == (0, 1), "idle ones gave theirs up"


def test_it_is_tried_again_only_when_one_has_ended() -> None:
    s, ends = with_room(1)
    s.add(sequence("a", new=8, name="a"))
    s.add(sequence("b", new=2, name="b"))
    for _ in range(7):
        play(s, s.plan()[0])
        assert set(s.running) == {"a"}
    assert ends.tries == 2, "one of a, one of b"
    assert run(s) == ["b"]


def test_others_run_beside_one_that_waits_for_memory() -> None:
    s, _ = with_room(1)
    s.add(sequence("a1", new=8, name="a"))
    s.add(sequence("b", new=2, name="b"))
    play(s, s.plan()[0])
    s.add(sequence("base", new=2))
    s.add(sequence("a2", new=2, name="a"))
    assert {a.job_id for a in s.plan()[1]} == {"base", "a2"}


def test_an_old_one_gets_the_memory_though_users_of_another_keep_coming(
    clock: SimpleNamespace,
) -> None:
    s, _ = with_room(1)
    s.add(sequence("a-0", new=5, name="a"))
    play(s, s.plan()[0])
    s.add(sequence("b", new=2, name="b"))
    for step in range(200):
        clock.s += 0.1
        if len(s.waiting) < 4:
            s.add(sequence(f"a-{step + 1}", new=5, name="a"))
        chunks, admitted = s.plan()
        play(s, chunks)
        if "b" in [one.job_id for one in admitted]:
            return
    pytest.fail("b was never admitted")


def test_one_that_finds_no_memory_even_alone_is_refused() -> None:
    s, _ = with_room(0)
    s.add(sequence("base", new=3))
    for number in range(2):
        s.add(sequence(f"b{number}", new=2, name="b"))
    play(s, s.plan()[0])
    assert set(s.waiting) == {"b0", "b1"}, "something else may have the memory"
    run(s)
    assert [one.job_id for one, _ in s.refused] == ["b0", "b1"]
    assert (s.slots.resident, s.slots.users) == (0, 0)
