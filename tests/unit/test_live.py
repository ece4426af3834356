"""Live jobs: which of them are past the time to begin."""

from __future__ import annotations

import pytest

from lorabatch import Job
from lorabatch.ledger import Claim
from lorabatch_worker.delivery import Delivery
from lorabatch_worker.live import LiveJob


@pytest.mark.parametrize(
    ("expires_s", "started_s", "expired"),
    [
        ([5.0], None, True),
        ([5.0, 9.0], None, True),
        ([15.0], None, False),
        ([5.0, 15.0], None, False),
        ([5.0, None], None, False),
        ([None], None, False),
        ([], None, False),
        ([5.0], 4.0, False),
        ([-5.0], None, True),
    ],
)
def test_a_job_expires_when_none_of_its_messages_wants_it_any_more(
    expires_s: list[float | None], started_s: float | None, expired: bool
) -> None:
    claim = Claim(Job(prompt="x"), 1, "me", 1, 0)
    deliveries = [Delivery("a", lambda _: None, expires_s=limit) for limit in expires_s]
    assert LiveJob(claim, deliveries, started_s).expired(10.0) is expired
