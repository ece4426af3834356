"""The soak in small: a stream of jobs, faults on it, and what is seen of one worker that stays."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from lorabatch.tables import results
from tests.faults.blows import blows
from tests.faults.meter import Meter
from tests.faults.shop import Shop
from tests.faults.soak import growth, judged, wait_for_the_end
from tests.faults.street import Street
from tests.faults.waiting import until

BLOWS = ("kill -9, at random", "FLUSHALL", "5 TCP resets")
JOBS = 60


def test_faults_on_a_stream_lose_nothing_and_leave_one_worker_alone(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    shop = Shop(tmp_path / "shop")
    try:
        street = Street(shop, rng, 20.0)
        survivor, others = street.survivor, street.members[1:]
        meter = Meter(street, tmp_path / "samples", 0.2)
        street.stream.start()
        meter.start()
        assert all(blows(shop.database)[name](street, random.Random(seed)) for name in BLOWS)
        until("jobs of both kinds", lambda: _both_kinds(street))
        until("a job of the survivor", street.survivor_claims)
        street.stream.stop()
        meter.stop()
        assert [*wait_for_the_end(street), *street.wrong, street.stream.error] == [""]
        assert street.survivor is survivor
        assert survivor.alive
        assert street.members[1:] != others
        assert judged(street).faultless
        assert 0 < street.survivor_claims() < street.stream.jobs
        assert street.survivor_claims(shop.now_us()) == 0
        seen = meter.samples[-1]
        assert seen["survivor"]["pid"] == survivor.process.pid
        assert min(seen["survivor"][name] for name in ("rss_mb", "fds", "threads")) > 0
        assert sum(seen["ledger"].values()) > 0
        with shop.ledger.engine.begin() as connection:  # and it would be seen
            lost = street.stream.portions[0].ids[7]
            connection.execute(sa.delete(results).where(results.c.job_id == lost))
        assert judged(street).lost == 1
    finally:
        shop.close()


def _both_kinds(street: Street) -> bool:
    portion = street.stream.portions[0]
    return len(portion.jobs) >= JOBS and 0 < len(portion.plain) < len(portion.jobs)


def test_growth_is_what_comes_after_the_warm_up() -> None:
    found = growth([_sample(minutes) for minutes in range(61)])
    assert found["warm_minutes"] == 5.0
    assert found["rss_mb"] == [100.0, 125.0, 155.0]
    assert found["rss_mb_per_hour"] == pytest.approx(60.0)
    assert found["rss_mb_grown"] == pytest.approx(55.0)
    assert found["fds"] == [20, 20, 20]
    assert found["fds_grown"] == 0.0


def _sample(minutes: int) -> dict[str, Any]:
    """A worker that takes 50 MB to start and then a MB a minute."""
    rss_mb = 50.0 + 10.0 * minutes if minutes < 5 else 95.0 + minutes
    return {"minutes": float(minutes), "survivor": {"rss_mb": rss_mb, "fds": 20, "threads": 10}}
