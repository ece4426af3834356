"""What runs in the next step: every running sequence's next token, then prefill chunks.

Admission goes by priority, then by rounds, in which each tenant gets its share of tokens (see
fair_share.py), then to jobs whose adapter is already on the device, then by age. A job that has
waited longer than the age cap goes before resident ones of its round; if it cannot get a slot or
blocks, nothing behind it that would keep them from it is admitted until it does, so that nothing
starves. A suspect, which may be what stops the workers, runs alone. Blocks are given out as text
grows; when there is none left, the sequence that came last gives up its own, waits again and is
computed anew, and its tokens stay what they were.
Not covered: shares of blocks or adapter slots; whoever came last gives up blocks, of any tenant.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from lorabatch_worker.adapters.slots import AdapterSlots
from lorabatch_worker.block_manager import BlockManager
from lorabatch_worker.fair_share import FairShare, alike
from lorabatch_worker.memory import out_of_memory
from lorabatch_worker.sequence import Family, Sequence

__all__ = ["Chunk", "Scheduler"]


@dataclass(frozen=True)
class Chunk:
    """Positions [start, end) of one sequence, to be computed in this step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def samples(self) -> bool:
        """Whether the step yields this sequence's next token."""
        return self.end == self.sequence.length


class Scheduler:
    """Waiting and running sequences. Used from the engine's thread alone."""

    def __init__(
        self,
        blocks: BlockManager,
        slots: AdapterSlots,
        max_seqs: int,
        max_step_tokens: int,
        age_cap_s: float,
        *,
        weight_of: Callable[[str], float] = alike,
        quantum_tokens: int | None = None,
    ) -> None:
        """`weight_of` a tenant: see FairShare. `quantum_tokens`: of a round, for each unit of
        weight; None: as many as a step computes. More of them load adapters less often."""
        self.blocks = blocks
        self.slots = slots
        self.max_seqs = max_seqs
        self.max_step_tokens = max_step_tokens
        self.age_cap_s = age_cap_s
        self.waiting: dict[str, Sequence] = {}  # by key
        self.running: dict[str, Sequence] = {}  # in order of admission
        self.refused: list[tuple[Sequence, Exception]] = []
        """Out of both, one of each job: their adapter could not be put into a slot, even alone if
        memory lacked."""
        self.on_suspect: Callable[[Sequence], None] = lambda _: None
        """Told before anything of a suspect, its adapter too, is put on the device."""
        self.preemptions = 0
        self._no_memory = False  # for another adapter, until one of those that run has ended
        self._begun_s: dict[str, float] = {}  # the last of each adapter's jobs, by version
        self.fair_share = FairShare(quantum_tokens or max_step_tokens, weight_of)

    @property
    def counts(self) -> dict[str, int]:
        """So far, but for what is resident now; for people."""
        return {
            "preemptions": self.preemptions,
            "prefix_queried_tokens": self.blocks.queried_tokens,
            "prefix_cached_tokens": self.blocks.cached_tokens,
            "adapters_resident": self.slots.resident,
            "adapter_loads": self.slots.loads,
        }

    def add(self, sequence: Sequence) -> None:
        self.waiting[sequence.key] = sequence
        self.fair_share.waits(sequence)

    def end(self, family: Family) -> bool:
        """Take out all of a job that are left, and trust nothing of them: whether the job had not
        ended before."""
        for sequence in family.members:
            self.remove(sequence.key)
        open_until_now, family.closed = not family.closed, True
        return open_until_now

    def end_jobs(self, job_ids: Collection[str]) -> list[Sequence]:
        """Take out all sequences of these jobs: one of each job."""
        here = (*self.running.values(), *self.waiting.values()) if job_ids else ()
        return [s for s in here if s.job_id in job_ids and self.end(s.family)]

    def remove(self, key: str, keep: bool = False) -> Sequence | None:
        """Take a sequence out, wherever it is, and free what it holds; `keep` what it computed
        for others that begin alike."""
        sequence = self.waiting.pop(key, None)
        if sequence is not None:
            self.fair_share.leaves(sequence)
            return sequence
        sequence = self.running.pop(key, None)
        if sequence is not None:
            self._no_memory = False
            self.fair_share.leaves(sequence)
            self.blocks.release(sequence, keep)
            self.slots.release(sequence.slot)
            sequence.slot = -1
        return sequence

    def plan(self, admit: bool = True) -> tuple[list[Chunk], list[Sequence]]:
        """The next step's chunks, decode first, and of each job that begins with it the first
        sequence."""
        self._make_room()
        self.fair_share.lift()
        decode = [Chunk(s, s.computed, s.length) for s in self.running.values() if s.pending == 1]
        budget = self.max_step_tokens - len(decode)
        prefill: list[Chunk] = []
        for sequence in [s for s in self.running.values() if s.pending > 1]:
            budget -= _take(sequence, budget, prefill)
        admitted = self._admit(budget, prefill) if admit else []
        return decode + prefill, admitted

    def _make_room(self) -> None:
        """A block for every running sequence's last token, whoever has to give it up."""
        for sequence in list(self.running.values()):
            while sequence.key in self.running and not self.blocks.grow(sequence):
                self._preempt(next(reversed(self.running)))

    def _preempt(self, key: str) -> None:
        sequence = self.remove(key)
        assert sequence is not None
        sequence.computed = 0
        sequence.preempted = True
        self.preemptions += 1
        self.add(sequence)

    def _admit(self, budget: int, prefill: list[Chunk]) -> list[Sequence]:
        admitted: list[Sequence] = []
        if not self.waiting or budget <= 0 or len(self.running) >= self.max_seqs:
            return admitted
        old = time.monotonic() - self.age_cap_s
        closed = set[str | None]()  # adapters that admit no more until an old job is in
        put_off = set[Family]()  # their other new texts begin alike, and would be put off too
        loads = True
        had_a_turn = self._had_a_turn(old)
        for sequence in self._candidates(old):
            if budget <= 0 or len(self.running) >= self.max_seqs:
                break
            if (
                sequence.adapter_version in closed
                or not (loads or self.slots.is_resident(sequence.adapter))
                or (sequence.family in put_off and not sequence.output)
            ):
                continue
            aged = sequence.waiting_since_s < old
            shared = self.blocks.will_be_shared(sequence)
            # One block more for each running sequence, or it would soon be preempted for them.
            if shared or not self.blocks.can_allocate(sequence, spare=len(self.running)):
                if aged and not shared:
                    break
                put_off.add(sequence.family)
                continue
            if not self._acquire(sequence):
                if aged and sequence.key in self.waiting:
                    if self._no_memory:
                        break
                    if sequence.adapter_version not in had_a_turn:
                        closed |= self._soonest_way_in(sequence)
                        loads = False
                continue
            self._begin(sequence)
            if sequence.family.begins():
                admitted.append(sequence)
            budget -= _take(sequence, budget, prefill)
        return admitted

    def _candidates(self, old: float) -> Iterator[Sequence]:
        """Whose turn it is, one after another as they begin. A suspect is alone, as a job."""
        alone = self._alone()
        ordered = sorted(self.waiting.values(), key=lambda s: self._order(s, old))
        for sequence in self.fair_share.in_turn(ordered):
            if alone is not None and sequence.family is not alone:
                continue
            suspect = sequence.claim.suspect
            if suspect and self.running and alone is None:
                if sequence.waiting_since_s < old:
                    return  # until those that run have ended
                continue
            if sequence.key in self.waiting:
                yield sequence
            if suspect and self.running:
                alone = sequence.family

    def _alone(self) -> Family | None:
        """The suspect job that has begun, until its last sequence has ended."""
        here = (*self.running.values(), *self.waiting.values())
        return next((s.family for s in here if s.claim.suspect and s.family.begun), None)

    def _begin(self, sequence: Sequence) -> None:
        self.blocks.allocate(sequence)
        del self.waiting[sequence.key]
        self.running[sequence.key] = sequence
        if not sequence.preempted:
            sequence.cached_tokens = sequence.computed
        self.fair_share.begins(sequence)
        if sequence.adapter is not None:
            self._begun_s[sequence.adapter.version] = time.monotonic()

    def _had_a_turn(self, old: float) -> frozenset[str]:
        """Adapters whose jobs must not close others yet, however old: those that began since then,
        where tenants wait for each other. All jobs of a backlog are old, and adapters that closed
        each other again and again would have the device run empty each time."""
        self._begun_s = {version: s for version, s in self._begun_s.items() if s >= old}
        return frozenset(self._begun_s if self.fair_share.tenants > 1 else ())

    def _acquire(self, sequence: Sequence) -> bool:
        """Put its adapter into a slot. False: there is no room now, or it is refused."""
        if self._no_memory and not self.slots.is_resident(sequence.adapter):
            return False
        if sequence.claim.suspect and not sequence.family.begun:
            self.on_suspect(sequence)
        try:
            return self.slots.acquire(sequence)
        except Exception as error:  # noqa: BLE001 - whatever a device raises, others go on
            if out_of_memory(error) and self.running:
                self._no_memory = True
            else:
                self._refuse(sequence, error)
            return False

    def _refuse(self, sequence: Sequence, error: Exception) -> None:
        """All of the same adapter: none of them is running."""
        version = sequence.adapter_version
        for other in [s for s in self.waiting.values() if s.adapter_version == version]:
            if self.end(other.family):
                self.refused.append((other, error))

    def _order(self, sequence: Sequence, old: float) -> tuple[int, bool, bool, float]:
        aged = sequence.waiting_since_s < old
        resident = self.slots.is_resident(sequence.adapter)
        return (
            -sequence.claim.job.priority,
            not aged,
            not (aged or resident),
            sequence.waiting_since_s,
        )

    def _soonest_way_in(self, waiting: Sequence) -> frozenset[str]:
        """Adapters that are to be left alone so that this one's fits: those with the fewest tokens
        left to make, and those between them that nobody uses now."""
        assert waiting.adapter is not None
        left = Counter[str]()
        for s in self.running.values():
            if s.adapter is not None:
                left[s.adapter.version] += s.max_length - s.length
        ways = self.slots.ways_in(waiting.adapter)
        return min(ways, key=lambda way: sum(left[v] for v in way), default=frozenset())


def _take(sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
    """Plan as much of a sequence's prefill as the budget allows: the tokens taken."""
    count = min(sequence.pending, budget)
    if count > 0:
        chunks.append(Chunk(sequence, sequence.computed, sequence.computed + count))
    return max(count, 0)
