"""SIGTERM and SIGQUIT: nothing is lost, and what did not end can be claimed at once."""

from __future__ import annotations

import json
import signal

import pytest
from shop import Shop, check_exactly_once, wait_until

from lorabatch.tables import job_attempts


def some_ended(shop: Shop, count: int) -> None:
    wait_until(f"{count} ended", lambda: shop.ledger.counts().get("succeeded", 0) >= count)


def test_sigterm_finishes_the_running_and_hands_the_rest_back(any_shop: Shop) -> None:
    shop = any_shop
    first = shop.start().wait_ready()
    accepted = shop.accept(120, tokens=40)
    some_ended(shop, 10)
    first.signal(signal.SIGTERM)
    assert first.wait() == 0, first.text()
    (stopping,) = (x for x in first.text().splitlines() if '"stopping"' in x)
    assert 0 < json.loads(stopping)["occupancy"] <= 1
    counts = shop.ledger.counts()
    assert counts.get("running", 0) == 0, counts
    assert counts["queued"] > 0, counts
    assert not {"unacked", "unacked_index"} & shop.in_broker().keys()
    assert {row.outcome for row in shop.rows(job_attempts)} == {"succeeded", "released"}
    shop.start().wait_ready()
    shop.wait_ended(120)
    check_exactly_once(shop, accepted)
    shop.wait_broker_empty()


@pytest.mark.parametrize(
    "signals",
    [(signal.SIGQUIT,), (signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGQUIT)],
    ids=["quit", "term-term", "term-quit"],
)
def test_a_cold_stop_releases_running_jobs_at_once(
    shop: Shop, signals: tuple[signal.Signals, ...]
) -> None:
    first = shop.start(LORABATCH_DRAIN_S="600").wait_ready()
    accepted = shop.accept(20, tokens=20_000)
    wait_until("running", lambda: shop.ledger.counts().get("running") == 20)
    for number in signals:
        first.signal(number)
        if number == signal.SIGTERM:
            wait_until("stopping", lambda: '"stopping"' in first.text())
    first.wait()
    assert "Unrecoverable" not in first.text()
    assert shop.ledger.counts() == {"queued": 20}, first.text()
    assert shop.in_broker() == {"lorabatch": len(accepted)}


def test_sigterm_past_the_drain_time_hands_running_jobs_back(shop: Shop) -> None:
    worker = shop.start(LORABATCH_DRAIN_S="0.2").wait_ready()
    shop.accept(20, tokens=20_000)
    wait_until("running", lambda: shop.ledger.counts().get("running") == 20)
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0, worker.text()
    assert shop.ledger.counts() == {"queued": 20}
    assert shop.in_broker() == {"lorabatch": 20}


def test_a_stopped_worker_that_wakes_up_late_writes_nothing(postgres_shop: Shop) -> None:
    shop = postgres_shop
    first = shop.start().wait_ready()
    accepted = shop.accept(60, tokens=60)
    some_ended(shop, 5)
    first.signal(signal.SIGSTOP)
    shop.start().wait_ready()
    wait_until("taken over", lambda: 2 in shop.executions().values())
    first.signal(signal.SIGCONT)
    shop.wait_ended(60)
    first.signal(signal.SIGTERM)
    assert first.wait() == 0, first.text()
    check_exactly_once(shop, accepted)
    shop.wait_broker_empty()
