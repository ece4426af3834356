"""A job that kills its worker each time it runs: found, given up, and nobody else with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from shop import Shop, wait_until

from lorabatch import Job
from lorabatch.dead import DeadLetters
from lorabatch.tables import job_attempts, results, usage_events

WORKERS = 12


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    made = Shop(tmp_path / "home")
    made.env["LORABATCH_LEASE_S"] = "1"
    yield made
    made.close()


@pytest.mark.parametrize("kind", ["poison", "breaks"])
def test_a_poison_job_is_given_up_and_takes_nobody_along(shop: Shop, kind: str) -> None:
    """One that ends the process, and one that has it lose its device and end itself."""
    fine = shop.accept(40, tokens=20)
    poison = Job(prompt=kind, sampling_params={"max_new_tokens": 5})
    shop.ledger.accept([poison])
    shop.send([poison])
    for _ in range(WORKERS):  # as a supervisor would start them again
        worker = shop.start()
        wait_until(
            "all ended, or the worker is dead",
            lambda w=worker: shop.ended(41) or w.process.poll() is not None,  # type: ignore[misc]
            60.0,
        )
        if shop.ended(41):
            break
    assert shop.ledger.counts() == {"succeeded": 40, "failed": 1}
    error = shop.ledger.results([poison.job_id])[poison.job_id].error
    assert error is not None
    assert error.code == "attempts_exhausted"
    (letter,) = DeadLetters(shop.ledger.engine).list()
    assert (letter.job_id, letter.crashes >= 1) == (poison.job_id, True)
    for table in (results, usage_events):
        assert Counter(row.job_id for row in shop.rows(table)) == Counter(
            [poison.job_id, *(job.job_id for job in fine)]
        )
    ends = [row.outcome for row in shop.rows(job_attempts) if row.job_id == poison.job_id]
    assert ends.count("failed") == 1
    assert len(ends) <= 8, "at most four that nobody heard of, three alone, and the last word"
