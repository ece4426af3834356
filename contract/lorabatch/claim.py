"""What the ledger hands to a worker and takes back: a claim on a job, its start and its outcome."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from lorabatch.job import Job
from lorabatch.result import Result

__all__ = ["Claim", "Message", "Outcome", "Start", "suspected"]

CRASHES = 2
LOSSES = 4  # what stops a worker at once does so before the ledger hears that it began


class Message(NamedTuple):
    """What the queue carries of an accepted job: enough to route by, nothing private."""

    job_id: str
    tenant: str
    adapter_id: str | None
    publish_result: bool = False


def suspected(crashes: int, losses: int) -> bool:
    return crashes >= CRASHES or losses >= LOSSES


@dataclass(frozen=True)
class Claim:
    """The right to run a job until the lease runs out; `attempt` is the number of this run.

    `adapter_versions`: what its adapters' names stood for when it was accepted; a name that was not
    registered then is left out. `losses`: leases on it that ran out; `crashes`: those of them that
    ran out after it had begun to run, as far as the ledger heard of it in time. `died_alone`: the
    last one did, and it was the only job that ran.
    """

    job: Job
    lease_token: int
    attempt: int
    submitted_us: int
    started_us: int
    publish_result: bool = False
    adapter_versions: Mapping[str, str] = field(default_factory=dict)
    crashes: int = 0
    losses: int = 0
    died_alone: bool = False

    @property
    def suspect(self) -> bool:
        """It may be what stops the workers: it runs alone."""
        return suspected(self.crashes, self.losses)


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
