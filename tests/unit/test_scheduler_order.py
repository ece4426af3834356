"""What runs next: chunks, priority, residency and age, and no starvation."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabatch_worker.scheduler import Scheduler
from tests.scheduling import play, run, scheduler, sequence


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that moves when told to."""
    now = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: now.s)
    return now


@given(prompt=st.integers(1, 60), step_tokens=st.integers(1, 17))
@settings(max_examples=50, deadline=None)
def test_a_long_prompt_is_computed_in_chunks_that_fill_the_budget(
    prompt: int, step_tokens: int
) -> None:
    s = scheduler(max_seqs=1, step_tokens=step_tokens)
    s.add(sequence("long", prompt, new=1))
    sizes = []
    while s.running or s.waiting:
        chunks, _ = s.plan()
        sizes += [c.end - c.start for c in chunks]
        assert [c.samples for c in chunks] == [sum(sizes) == prompt]
        play(s, chunks)
    full, rest = divmod(prompt, step_tokens)
    assert sizes == [step_tokens] * full + ([rest] if rest else [])


def test_decode_goes_on_while_a_long_prompt_is_prefilled() -> None:
    s = scheduler(step_tokens=8)
    s.add(sequence("short", 2, new=9))
    play(s, s.plan()[0])
    s.add(sequence("long", 40, new=1))
    for _ in range(3):
        chunks, _ = s.plan()
        assert [(c.sequence.job_id, c.end - c.start) for c in chunks] == [("short", 1), ("long", 7)]
        play(s, chunks)


def test_nothing_is_admitted_when_told_so() -> None:
    s = scheduler()
    s.add(sequence("a"))
    assert s.plan(admit=False) == ([], [])
    assert list(s.waiting) == ["a"]


def test_priority_goes_before_residency_and_age(clock: SimpleNamespace) -> None:
    s = scheduler(max_seqs=1, slots=1)
    for job_id, name, priority in [("old", "a", 0), ("low", "a", -5), ("high", "b", 5)]:
        s.add(sequence(job_id, name=name, priority=priority))
        clock.s += 20
    assert run(s) == ["high", "old", "low"]


def test_jobs_of_a_resident_adapter_go_first_until_others_are_old(clock: SimpleNamespace) -> None:
    s = scheduler(max_seqs=1, slots=1)
    for job_id, name in [("a1", "a"), ("b1", "b"), ("a2", "a"), ("base", None)]:
        s.add(sequence(job_id, name=name))
        clock.s += 0.01
    assert run(s) == ["base", "a1", "a2", "b1"]
    assert s.slots.loads == 2
    for job_id, name in [("a3", "a"), ("b2", "b"), ("a4", "a")]:
        s.add(sequence(job_id, name=name))
        clock.s += 0.01
    clock.s += 10
    assert run(s) == ["a3", "b2", "a4"]


class Waits:
    """A scheduler under load: how long those jobs waited that must not starve."""

    def __init__(self, s: Scheduler, clock: SimpleNamespace) -> None:
        self.s, self.clock = s, clock
        self.rng = random.Random(0)
        self.serial = iter(range(10**6))
        self.submitted: dict[str, float] = {}
        self.waited: dict[str, float] = {}

    def top_up(self, name: str, count: int) -> None:
        """So many jobs of this adapter always wait."""
        version = f"version of {name}"
        have = sum(w.adapter_version == version for w in self.s.waiting.values())
        for _ in range(count - have):
            new = self.rng.randrange(5, 30)
            self.s.add(sequence(f"greedy-{next(self.serial)}", new=new, name=name))

    def submit(self, name: str) -> None:
        job_id = f"rare-{next(self.serial)}"
        self.submitted[job_id] = self.clock.s
        self.s.add(sequence(job_id, new=5, name=name))

    def step(self) -> None:
        chunks, admitted = self.s.plan()
        rare = [a.job_id for a in admitted if a.job_id in self.submitted]
        self.waited |= {job_id: self.clock.s - self.submitted[job_id] for job_id in rare}
        play(self.s, chunks)


def test_more_adapters_than_slots_starve_nobody(clock: SimpleNamespace) -> None:
    """Two adapters could keep both slots for ever; eight others must get their turn."""
    waits = Waits(scheduler(max_seqs=8, slots=2, age_cap_s=5.0, blocks=100), clock)
    for step in range(2000):
        clock.s += 0.1
        for greedy in ("x0", "x1"):
            waits.top_up(greedy, 4)
        if step % 100 == 0:
            waits.submit(f"y{step // 100 % 8}")
        waits.step()
    assert {j for j, t in waits.submitted.items() if t < clock.s - 15} <= set(waits.waited)
    assert max(waits.waited.values()) < 5.0 + 6.0  # the cap, and about twice the longest job


@pytest.mark.parametrize(
    ("small", "rank", "large", "pool_rows", "slots"),
    [(4, 4, 16, 16, 8), (2, 8, 16, 16, 8), (8, 16, 64, 128, 16), (8, 16, 64, 128, 8)],
)
def test_a_large_adapter_gets_its_rows_among_small_ones(
    clock: SimpleNamespace, small: int, rank: int, large: int, pool_rows: int, slots: int
) -> None:
    """Each small adapter always has a job that waits: together they could keep every gap of the
    pool too narrow for ever."""
    s = scheduler(max_seqs=16, slots=slots, pool_rows=pool_rows, age_cap_s=5.0, blocks=400)
    waits = Waits(s, clock)
    for step in range(900):
        clock.s += 0.1
        for i in range(small):
            waits.top_up(f"small{i}-r{rank}", 1)
        if step % 300 == 0:
            waits.submit(f"large{step}-r{large}")
        waits.step()
    assert set(waits.waited) == set(waits.submitted)
    assert max(waits.waited.values()) < 5.0 + 6.0


@pytest.mark.usefixtures("layout")
def test_a_big_old_job_gets_its_blocks(clock: SimpleNamespace) -> None:
    """Small jobs keep coming and always fit; the one that needs all blocks must run too."""
    s = scheduler(max_seqs=4, blocks=8, step_tokens=64)
    s.add(sequence("small-0", new=5))
    play(s, s.plan()[0])
    s.add(sequence("big", prompt=20, new=12))
    for step in range(400):
        clock.s += 0.1
        if len(s.waiting) < 4:
            s.add(sequence(f"small-{step + 1}", new=5))
        chunks, admitted = s.plan()
        play(s, chunks)
        if "big" in [a.job_id for a in admitted]:
            return
    pytest.fail("the big job was never admitted")


def test_jobs_that_need_no_slot_go_on_while_an_old_one_waits_for_its_slot(
    clock: SimpleNamespace,
) -> None:
    s = scheduler(max_seqs=4, slots=1)
    s.add(sequence("a1", new=30, name="a"))
    play(s, s.plan()[0])
    s.add(sequence("b1", new=2, name="b"))
    clock.s += 10
    s.add(sequence("base", new=2))
    s.add(sequence("a2", new=2, name="a"))
    _, admitted = s.plan()
    assert [a.job_id for a in admitted] == ["base"]
