"""Tenants that share places without a scheduler: who begins, what each is given, and the bound."""

from __future__ import annotations

from collections import defaultdict

from lorabatch_worker.fair_share import FairShare
from lorabatch_worker.sequence import Sequence
from tests.scheduling import sequence


class Machine:
    """`places` for jobs of all tenants."""

    def __init__(self, places: int, quantum: int, weights: dict[str, float] | None = None) -> None:
        self.places = places
        self.weights = defaultdict(lambda: 1.0, weights or {})
        self.fair = FairShare(quantum, self.weights.__getitem__)
        self.waiting: dict[str, Sequence] = {}
        self.running: dict[str, Sequence] = {}
        self.ends: dict[str, int] = {}  # made tokens at which a job ends
        self.largest: dict[str, int] = defaultdict(int)
        self.could_take: dict[str, int] = defaultdict(int)  # the most that running jobs ever could
        self.serial = 0

    def submit(self, tenant: str, prompt: int, new: int, made: int, priority: int = 0) -> str:
        self.serial += 1
        one = sequence(f"{tenant}-{self.serial}", prompt, new, None, priority, tenant)
        self.waiting[one.job_id] = one
        self.ends[one.job_id] = min(made, new)
        self.largest[tenant] = max(self.largest[tenant], one.max_length)
        self.fair.waits(one)
        return one.job_id

    def keep_waiting(self, tenant: str, *job: int) -> None:
        """More of them than there are places."""
        while sum(s.claim.job.tenant == tenant for s in self.waiting.values()) <= self.places:
            self.submit(tenant, *job)

    def begin(self) -> list[str]:
        """Fill the places: the tenants of the jobs that begin."""
        self.fair.lift()
        begun = []
        order = sorted(self.waiting.values(), key=lambda s: -s.claim.job.priority)
        for one in self.fair.in_turn(order):
            if len(self.running) >= self.places:
                break
            tenant = one.claim.job.tenant
            self.running[one.job_id] = self.waiting.pop(one.job_id)
            self.fair.begins(one)
            self.could_take[tenant] = max(self.could_take[tenant], self._can_take(tenant))
            begun.append(tenant)
        return begun

    def step(self) -> list[str]:
        begun = self.begin()
        for one in list(self.running.values()):
            one.computed = one.length
            one.output.append(7)
            if len(one.output) >= self.ends[one.job_id]:
                self.fair.leaves(self.running.pop(one.job_id))
        return begun

    def preempt(self) -> None:
        job_id, one = self.running.popitem()
        self.fair.leaves(one)
        one.computed = 0
        one.preempted = True
        self.waiting[job_id] = one
        self.fair.waits(one)

    def given(self, tenant: str) -> float:
        return self.fair.served().get(tenant, 0) / self.weights[tenant]

    def bound(self, ahead: str, behind: str) -> float:
        own = self.largest[ahead] / self.weights[ahead]
        return self.fair.quantum_tokens + own + self.could_take[behind] / self.weights[behind]

    def _can_take(self, tenant: str) -> int:
        mine = [s for s in self.running.values() if s.claim.job.tenant == tenant]
        taken = sum(max(s.charged_tokens, s.length if s.computed else 0) for s in mine)
        return sum(s.max_length for s in mine) - taken


def together(machine: Machine, steps: int, *tenants: str) -> dict[str, float]:
    """What each is given while all of them have jobs that wait."""
    before = {tenant: machine.given(tenant) for tenant in tenants}
    for _ in range(steps):
        for tenant in tenants:
            machine.keep_waiting(tenant, 5, 10, 10)
        machine.step()
    return {tenant: machine.given(tenant) - before[tenant] for tenant in tenants}


def drained(machine: Machine, tenant: str) -> None:
    """All of its jobs have ended or been taken back."""
    for one in [s for s in machine.waiting.values() if s.claim.job.tenant == tenant]:
        machine.fair.leaves(machine.waiting.pop(one.job_id))
    while any(s.claim.job.tenant == tenant for s in machine.running.values()):
        machine.step()
