"""The jobs of one try, and what each may end as."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lorabatch import Job

__all__ = ["SUCCEEDED", "Batch"]

SUCCEEDED = frozenset({"succeeded"})


@dataclass
class Batch:
    """`plain`: ids of those that a plain Celery client sent. `allowed`: where it is not success."""

    jobs: dict[str, Job] = field(default_factory=dict)
    plain: set[str] = field(default_factory=set)
    allowed: dict[str, frozenset[str]] = field(default_factory=dict)

    @property
    def ids(self) -> list[str]:
        return list(self.jobs)

    def add(self, jobs: Iterable[Job], plain: bool = False) -> None:
        new = {job.job_id: job for job in jobs}
        self.jobs.update(new)
        if plain:
            self.plain.update(new)

    def may_end_as(self, job_id: str) -> frozenset[str]:
        return self.allowed.get(job_id, SUCCEEDED)
