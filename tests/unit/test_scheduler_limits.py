"""Random submits, steps and removals: the scheduler's limits always hold, and nothing is lost."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lorabatch_worker.block_manager import PagedBlocks
from lorabatch_worker.row_manager import RowBlocks
from lorabatch_worker.scheduler import Chunk
from lorabatch_worker.sequence import Family, Sequence
from tests.scheduling import BLOCK, play, scheduler, sequence


class SchedulerMachine(RuleBasedStateMachine):
    """Random submits, steps and removals; what must always hold is checked after each."""

    @initialize(
        max_seqs=st.integers(1, 5),
        extra=st.integers(0, 20),
        blocks=st.integers(8, 30),
        slots=st.integers(1, 3),
        age=st.sampled_from([1e-9, 1e9]),
        rows=st.booleans(),
        pool=st.sampled_from([None, 5, 6, 9]),
    )
    def begin(
        self,
        max_seqs: int,
        extra: int,
        blocks: int,
        slots: int,
        age: float,
        rows: bool,
        pool: int | None,
    ) -> None:
        self.s = scheduler(max_seqs, max_seqs + extra, blocks, slots, age, rows, pool)
        self.count = slots
        self.all: dict[str, Sequence] = {}
        self.begun: list[str] = []
        self.kv: dict[tuple[int, int], object] = {}
        self.done: set[str] = set()

    def text(self, s: Sequence, position: int) -> object:
        """All that a position's keys and values depend on."""
        return s.claim.job.tenant, s.adapter_version, s.tokens(0, position + 1)

    def change_memory(self) -> None:
        """What the cache does before a step."""
        for change in self.s.blocks.take_changes():
            start = change.row * self.s.blocks.num_blocks // self.s.max_seqs
            for block in range(change.first, change.last):
                for offset in range(BLOCK):
                    text = None
                    if change.kind == "copy":
                        source = change.source * self.s.blocks.num_blocks // self.s.max_seqs
                        text = self.kv.get((source + block, offset))
                    self.kv[start + block, offset] = text

    def compute(self, c: Chunk) -> None:
        """Write the chunk's positions; what it attends to must be what this sequence says."""
        s = c.sequence
        where = [(s.blocks[p // BLOCK], p % BLOCK) for p in range(c.end)]
        for p in range(c.start, c.end):
            self.kv[where[p]] = self.text(s, p)
        for p in range(c.end):
            assert self.kv[where[p]] == self.text(s, p)

    @rule(
        prompt=st.integers(1, 24),
        new=st.integers(1, 8),
        name=st.sampled_from([None, "a-r1", "b-r2", "c-r3", "d-r5"]),
        priority=st.integers(-1, 1),
        tenant=st.sampled_from("tu"),
        first=st.sampled_from([0, 0, 5]),
    )
    def add(
        self, prompt: int, new: int, name: str | None, priority: int, tenant: str, first: int
    ) -> None:
        job_id = f"j{len(self.all)}"
        self.all[job_id] = sequence(job_id, prompt, new, name, priority, tenant, first)
        self.s.add(self.all[job_id])

    @rule(data=st.data())
    @precondition(lambda self: bool(self.s.waiting or self.s.running))
    def remove(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from([*self.s.waiting, *self.s.running]))
        assert self.s.remove(job_id, data.draw(st.booleans())) is self.all[job_id]
        assert self.s.remove(job_id) is None
        self.done.add(job_id)

    @rule(admit=st.booleans())
    def step(self, admit: bool) -> None:
        chunks, admitted = self.s.plan(admit)
        self.change_memory()
        assert admit or not admitted
        self.begun += [a.job_id for a in admitted]
        assert sum(c.end - c.start for c in chunks) <= self.s.max_step_tokens
        decodes = [c.sequence.pending == 1 for c in chunks if c.sequence not in admitted]
        assert decodes == sorted(decodes, reverse=True)
        assert len({id(c.sequence) for c in chunks}) == len(chunks)
        planned = {c.sequence.job_id for c in chunks}
        for s in self.s.running.values():
            assert s.pending > 1 or s.job_id in planned
        for c in chunks:
            assert c.start == c.sequence.computed
            assert c.start < c.end <= c.sequence.length
            self.compute(c)
        for ended in play(self.s, chunks):
            self.done.add(ended.job_id)

    @rule()
    def finish_everything(self) -> None:
        for _ in range(5000):
            if not (self.s.running or self.s.waiting):
                break
            self.step(True)
        assert not self.s.running
        assert not self.s.waiting
        assert self.done == set(self.all)
        assert len(self.begun) == len(set(self.begun))

    @invariant()
    def limits_hold(self) -> None:
        running = list(self.s.running.values())
        blocks = self.s.blocks
        assert all(s.job_id in self.s.running for s in blocks._coming.values())
        assert all(len(s.blocks) == len(set(s.blocks)) for s in running)
        if isinstance(blocks, PagedBlocks):
            self.pages_hold(blocks, Counter(b for s in running for b in s.blocks))
        else:
            assert isinstance(blocks, RowBlocks)
            self.rows_hold(blocks, {s.blocks[0] // blocks.row_blocks: s for s in running})
        assert len(running) <= self.s.max_seqs
        assert not any(s.blocks or s.slot >= 0 for s in self.s.waiting.values())
        by_slot: dict[int, set[str]] = defaultdict(set)
        for s in running:
            assert (s.slot >= 0) == (s.adapter is not None)
            if s.adapter_version is not None:
                by_slot[s.slot].add(s.adapter_version)
        assert all(len(versions) == 1 for versions in by_slot.values())
        self.places_hold(Counter(s.slot for s in running if s.slot >= 0))

    def places_hold(self, users: Counter[int]) -> None:
        places = self.s.slots._by_slot
        assert set(places) <= set(range(self.count))
        assert {slot: one.users for slot, one in places.items() if one.users} == users
        pool = self.s.slots._pool
        if pool is not None:
            rows = [row for one in places.values() for row in one.rows or ()]
            assert len(rows) == len(set(rows))
            assert all(0 <= row < pool.count for row in rows)
            assert sorted(rows) == [row for taken in pool._taken for row in taken]

    def pages_hold(self, blocks: PagedBlocks, owners: Counter[int]) -> None:
        assert [owners[b] for b in range(blocks.num_blocks)] == blocks._users
        idle = [*blocks._empty, *blocks._idle]
        assert sorted([*idle, *owners]) == list(range(1, blocks.num_blocks))
        assert {b: d for d, b in blocks._known.items()} == blocks._digest

    def rows_hold(self, blocks: RowBlocks, owners: dict[int, Sequence]) -> None:
        assert len(owners) == len(self.s.running)
        assert sorted([*blocks._idle, *owners]) == list(range(self.s.max_seqs))
        used = {row: len(s.blocks) for row, s in owners.items()}
        assert all(len(s.blocks) <= blocks.row_blocks for s in owners.values())
        assert sum(used.values()) == blocks.capacity - blocks.free
        assert sum(blocks._held) <= blocks.capacity
        assert {row: n for row, n in enumerate(blocks._used) if n} == used
        assert all(h >= u for h, u in zip(blocks._held, blocks._used, strict=True))
        known = {(d, r) for d, rows in blocks._known.items() for r in rows}
        assert known == {(d, r) for r, texts in enumerate(blocks._texts) for d in texts}
        assert all(len(t) <= h for t, h in zip(blocks._texts, blocks._held, strict=True))

    def teardown(self) -> None:
        if not hasattr(self, "s"):
            return
        for job_id in [*self.s.waiting, *self.s.running]:
            self.s.remove(job_id)
        assert self.s.blocks.free == self.s.blocks.capacity
        assert self.s.slots.users == 0


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_removing_a_sequence_anywhere_frees_all_it_holds(steps: int) -> None:
    s = scheduler(step_tokens=4)
    target = sequence("target", prompt=10, new=6, name="a")
    s.add(target)
    for _ in range(steps):
        play(s, s.plan()[0])
    assert s.remove("target") is target
    assert (target.blocks, target.slot) == ([], -1)
    assert s.blocks.free == s.blocks.capacity
    assert s.slots.users == 0
    assert s.plan() == ([], [])
    assert s.remove("target") is None


def test_sequence_tokens_span_prompt_and_output() -> None:
    s: Any = sequence("j", prompt=3, new=4)
    s.output = [10, 11]
    whole = [0, 1, 2, 10, 11]
    for start in range(5):
        for end in range(start, 6):
            assert s.tokens(start, end) == whole[start:end]


def test_texts_that_begin_alike_are_looked_at_once_where_there_is_no_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or 16 texts of each job that waits would hold up every step."""
    s = scheduler(max_seqs=8, blocks=8, rows=False)
    s.add(sequence("runs", prompt=16, new=16))
    play(s, s.plan()[0])
    waiting = Family.of(5, lambda: sequence("waits", prompt=30, first=100))
    for one in waiting.members:
        s.add(one)
    looked: list[int] = []
    can_allocate = s.blocks.can_allocate
    monkeypatch.setattr(
        s.blocks,
        "can_allocate",
        lambda one, spare: (looked.append(one.number), can_allocate(one, spare))[1],
    )
    s.plan()
    assert looked == [0]
    assert len(s.waiting) == 5
