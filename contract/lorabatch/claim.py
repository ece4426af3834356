"""What the ledger hands to a worker and takes back: a claim on a job, and its outcome."""

from __future__ import annotations

from dataclasses import dataclass

from lorabatch.job import Job
from lorabatch.result import Result

__all__ = ["Claim", "Outcome"]


@dataclass(frozen=True)
class Claim:
    """The right to run a job until the lease runs out; `attempt` is the number of this run."""

    job: Job
    lease_token: int
    attempt: int
    submitted_us: int
    started_us: int
    publish_result: bool = False


@dataclass(frozen=True)
class Outcome:
    """What an attempt ended as, to be recorded if its claim still stands."""

    claim: Claim
    result: Result
