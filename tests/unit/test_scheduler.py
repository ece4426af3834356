"""The scheduler and its blocks: limits that always hold, order, chunks, and no starvation."""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lorabatch import Job
from lorabatch_worker.adapters.slots import AdapterSlots
from lorabatch_worker.adapters.weights import Adapter
from lorabatch_worker.block_manager import BlockManager, PagedBlocks
from lorabatch_worker.row_manager import RowBlocks
from lorabatch_worker.scheduler import Chunk, Scheduler
from lorabatch_worker.sequence import Sequence
from tests.models import claim

BLOCK = 4
EOS = frozenset({-1})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that moves when told to."""
    now = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: now.s)
    return now


def adapter(name: str | None) -> Adapter | None:
    return None if name is None else Adapter(name, f"version of {name}", {}, None)


def sequence(
    job_id: str,
    prompt: int = 3,
    new: int = 4,
    name: str | None = None,
    priority: int = 0,
    tenant: str = "t",
    first: int = 0,
) -> Sequence:
    """Its prompt is first, first + 1, ..."""
    sampling: Any = {"max_new_tokens": new}
    job = Job(job_id=job_id, prompt="-", priority=priority, tenant=tenant, sampling_params=sampling)
    ids = list(range(first, first + prompt))
    return Sequence(claim(job), ids, adapter(name), waiting_since_s=time.monotonic())


LAYOUT = {"rows": False}
"""Which manager `scheduler` makes: rows, as on a CPU, or single blocks, as on a GPU."""


@pytest.fixture(params=["pages", "rows"])
def layout(request: pytest.FixtureRequest) -> Iterator[str]:
    LAYOUT["rows"] = request.param == "rows"
    yield request.param
    LAYOUT["rows"] = False


def scheduler(
    max_seqs: int = 4,
    step_tokens: int = 16,
    blocks: int = 32,
    slots: int = 2,
    age_cap_s: float = 5.0,
    rows: bool | None = None,
) -> Scheduler:
    manager: BlockManager = PagedBlocks(1 + blocks, BLOCK)
    if LAYOUT["rows"] if rows is None else rows:
        manager = RowBlocks(max_seqs, blocks, blocks, BLOCK)
    return Scheduler(manager, AdapterSlots({}, slots), max_seqs, step_tokens, age_cap_s)


def play(s: Scheduler, chunks: list[Chunk]) -> list[Sequence]:
    """Do what the engine does after a step: the sequences that ended."""
    for chunk in chunks:
        chunk.sequence.computed = chunk.end
        s.blocks.computed(chunk.sequence, chunk.start)
        if chunk.samples:
            chunk.sequence.append(7, EOS)
    done = [c.sequence for c in chunks if c.sequence.finish_reason is not None]
    for ended in done:
        s.remove(ended.job_id, keep=True)
    return done


def run(s: Scheduler, steps: int = 10_000) -> list[str]:
    """Job ids in the order in which they were admitted."""
    order: list[str] = []
    for _ in range(steps):
        chunks, admitted = s.plan()
        order += [a.job_id for a in admitted]
        play(s, chunks)
        if not (s.running or s.waiting):
            return order
    raise AssertionError(f"still there after {steps} steps: {list(s.waiting)} {list(s.running)}")


class SchedulerMachine(RuleBasedStateMachine):
    """Random submits, steps and removals; what must always hold is checked after each."""

    @initialize(
        max_seqs=st.integers(1, 5),
        extra=st.integers(0, 20),
        blocks=st.integers(8, 30),
        slots=st.integers(1, 3),
        age=st.sampled_from([1e-9, 1e9]),
        rows=st.booleans(),
    )
    def begin(
        self, max_seqs: int, extra: int, blocks: int, slots: int, age: float, rows: bool
    ) -> None:
        self.s = scheduler(max_seqs, max_seqs + extra, blocks, slots, age, rows)
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
        name=st.sampled_from([None, "a", "b", "c", "d"]),
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
        assert all(slot < len(self.s.slots._users) for slot in by_slot)
        users = [sum(s.slot == i for s in running) for i in range(len(self.s.slots._users))]
        assert self.s.slots._users == users

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
        assert not any(self.s.slots._users)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


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


def test_more_adapters_than_slots_starve_nobody(clock: SimpleNamespace) -> None:
    """Two adapters could keep both slots for ever; eight others must get their turn."""
    s = scheduler(max_seqs=8, slots=2, age_cap_s=5.0, blocks=100)
    rng = random.Random(0)
    serial = iter(range(10**6))
    submitted: dict[str, float] = {}
    waited: dict[str, float] = {}
    for step in range(2000):
        clock.s += 0.1
        for greedy in ("x0", "x1"):
            version = f"version of {greedy}"
            while sum(w.adapter_version == version for w in s.waiting.values()) < 4:
                s.add(sequence(f"greedy-{next(serial)}", new=rng.randrange(5, 30), name=greedy))
        if step % 100 == 0:
            job_id = f"rare-{next(serial)}"
            submitted[job_id] = clock.s
            s.add(sequence(job_id, new=5, name=f"y{step // 100 % 8}"))
        chunks, admitted = s.plan()
        rare = [a.job_id for a in admitted if a.job_id in submitted]
        waited |= {job_id: clock.s - submitted[job_id] for job_id in rare}
        play(s, chunks)
    assert {j for j, t in submitted.items() if t < clock.s - 15} <= set(waited)
    assert max(waited.values()) < 5.0 + 6.0  # the cap, and about twice the longest job


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
    assert s.slots._users == [0, 0]
    assert s.plan() == ([], [])
    assert s.remove("target") is None


def test_sequence_tokens_span_prompt_and_output() -> None:
    s: Any = sequence("j", prompt=3, new=4)
    s.output = [10, 11]
    whole = [0, 1, 2, 10, 11]
    for start in range(5):
        for end in range(start, 6):
            assert s.tokens(start, end) == whole[start:end]


def kept_tokens(s: Scheduler, *jobs: Sequence) -> list[int]:
    """Cached tokens of jobs that run one after the other."""
    for job in jobs:
        s.add(job)
        run(s)
    return [job.cached_tokens for job in jobs]


@pytest.mark.usefixtures("layout")
def test_a_common_beginning_is_computed_once() -> None:
    # What a and b made themselves follows on token 10, so c shares only what is full before that.
    jobs = [sequence("a", 11), sequence("b", 11), sequence("c", 30), sequence("d", 8, first=1)]
    assert kept_tokens(scheduler(blocks=40, step_tokens=64), *jobs) == [0, 8, 8, 0]


@pytest.mark.usefixtures("layout")
def test_a_whole_cached_prompt_still_yields_its_first_token() -> None:
    assert kept_tokens(scheduler(), sequence("a", 8), sequence("b", 8)) == [0, 4]


@pytest.mark.usefixtures("layout")
def test_nothing_is_shared_between_tenants_or_adapters() -> None:
    jobs = [
        sequence("a", 11, name="x", tenant="t"),
        sequence("b", 11, name="x", tenant="u"),
        sequence("c", 11, name="y", tenant="t"),
        sequence("d", 11, name=None, tenant="t"),
        sequence("e", 11, name="x", tenant="t"),
    ]
    assert kept_tokens(scheduler(blocks=99), *jobs) == [0, 0, 0, 0, 8]


@pytest.mark.usefixtures("layout")
def test_what_a_broken_job_computed_is_not_shared() -> None:
    s = scheduler()
    broken, whole = sequence("broken", 11), sequence("whole", 11)
    s.add(broken)
    play(s, s.plan()[0])
    s.remove("broken")
    assert kept_tokens(s, whole) == [0]


@pytest.mark.usefixtures("layout")
def test_jobs_wait_for_the_beginning_that_another_is_computing() -> None:
    s = scheduler(step_tokens=64)
    jobs = [sequence(name, 11) for name in "abc"]
    for job in jobs:
        s.add(job)
    first, begun = s.plan()
    assert [a.job_id for a in begun] == ["a"]
    play(s, first)
    assert [a.job_id for a in s.plan()[1]] == ["b", "c"]
    assert [j.cached_tokens for j in jobs] == [0, 8, 8]


@pytest.mark.usefixtures("layout")
def test_an_idle_block_is_forgotten_when_it_is_needed() -> None:
    s = scheduler(blocks=3, max_seqs=1)
    jobs = [sequence("a", 11, new=1), sequence("b", 11, new=1, first=50), sequence("c", 11, new=1)]
    assert kept_tokens(s, *jobs) == [0, 0, 0]


@pytest.mark.usefixtures("layout")
def test_without_blocks_the_last_to_come_gives_way_and_loses_nothing() -> None:
    s = scheduler(blocks=6, step_tokens=64)
    jobs = [sequence("a", 8, new=12), sequence("b", 8, new=12, first=50)]
    for job in jobs:
        s.add(job)
    assert run(s) == ["a", "b"]
    assert s.preemptions > 0
    assert [(j.preempted, len(j.output)) for j in jobs] == [(False, 12), (True, 12)]


@pytest.mark.usefixtures("layout")
def test_the_prefix_cache_can_be_off() -> None:
    s = scheduler()
    s.blocks.prefix_cache = False
    assert kept_tokens(s, sequence("a", 11), sequence("b", 11)) == [0, 0]
