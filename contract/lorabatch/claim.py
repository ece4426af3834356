"""What the ledger hands to a worker and takes back: a claim on a job, its start and its outcome."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from lorabatch.job import Job
from lorabatch.result import Result

__all__ = ["Claim", "Outcome", "Start"]


@dataclass(frozen=True)
class Claim:
    """The right to run a job until the lease runs out; `attempt` is the number of this run.

    `adapter_versions`: what its adapters' names stood for when it was accepted; a name that was not
    registered then is left out.
    """

    job: Job
    lease_token: int
    attempt: int
    submitted_us: int
    started_us: int
    publish_result: bool = False
    adapter_versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """A claimed job begins to run: an attempt. `at_s` is by this process's monotonic clock, because
    the ledger hears of it later."""

    claim: Claim
    at_s: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Outcome:
    """What an attempt ended as, to be recorded if its claim still stands; `at_s` as Start's."""

    claim: Claim
    result: Result
    at_s: float = field(default_factory=time.monotonic)
