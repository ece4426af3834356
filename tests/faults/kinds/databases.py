"""The database is away, refuses a transaction, or does not say what became of a commit."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import threading
import time
from collections.abc import Callable

import sqlalchemy as sa

from lorabatch.tables import jobs, results
from tests.faults.batch import Batch
from tests.faults.crew import Member
from tests.faults.observed import Observed
from tests.faults.shop import Shop
from tests.faults.waiting import until

__all__ = [
    "LONG_LEASE",
    "Lock",
    "away",
    "commit_cut",
    "deadlock",
    "locked",
    "locked_often",
    "not_serialized",
    "refused",
]

LONG_LEASE = {"LORABATCH_LEASE_S": "60"}
LOCKS_BACK_OFF_S = "0.2"
AWAY_S = (1.0, 4.0)
DEADLOCK_LIMIT_S = 8.0


def refused(shop: Shop, rng: random.Random, jobs: int) -> Observed:
    """Connections cut, and none taken for a while."""
    proxy = shop.database_proxy
    assert proxy is not None
    members = shop.crew.ready(2, LORABATCH_DATABASE_URL=shop.proxied_database_url, **LONG_LEASE)
    return away(shop, rng, jobs, members, proxy.refuse, proxy.allow)


def locked(shop: Shop, rng: random.Random, jobs: int) -> Observed:
    """Another process has SQLite's lock for longer than a worker waits for it."""
    members = shop.crew.ready(2, FAULT_BUSY_S=LOCKS_BACK_OFF_S, **LONG_LEASE)
    lock = Lock(shop)
    observed = away(shop, rng, jobs, members, lock.take, lock.give)
    lock.close()
    return observed


def away(
    shop: Shop,
    rng: random.Random,
    count: int,
    members: list[Member],
    take: Callable[[], None],
    give: Callable[[], None],
    tokens: tuple[int, int] = (10, 40),
) -> Observed:
    """Between `take` and `give` it refuses. No acknowledgement meanwhile; what is under a lease is
    not computed again."""
    batch = shop.accept(rng, count, tokens)
    shop.wait_moment(rng, batch, 0.5)
    take()
    time.sleep(rng.uniform(*AWAY_S))
    acknowledged = batch.jobs.keys() - shop.ids_in_broker()
    states = shop.ledger.states(batch.ids)
    early = [i for i in acknowledged if states.get(i) in ("queued", "running")]
    give()
    back_us = shop.now_us()
    wrong = [f"{len(early)} acknowledged before their commit"] if early else []

    def again() -> list[str]:
        started = shop.started()
        twice = [job_id for job_id in batch.ids if started[job_id] > 1]
        late = [f"{len(twice)} computed again under their lease"] if twice else []
        return wrong + late

    noticed = any('"database does not answer"' in member.news() for member in members)
    return Observed(batch, hit=noticed, recovered=_recorded(shop, batch, back_us), wrong=again)


def deadlock(shop: Shop, rng: random.Random, count: int) -> Observed:
    """A real one: somebody has one of a worker's jobs and then wants those that wait for it."""
    members = shop.crew.ready(2)
    batch = shop.accept(rng, count, tokens=(100, 300))
    shop.wait_moment(rng, batch, 0.5)
    until("jobs are held", lambda: shop.held_by(members[0], batch) or not _open(shop, batch))
    held = sorted(shop.held_by(members[0], batch))
    # A worker that waits since before there was a cycle looks for one no more: this one ends.
    victim = contextlib.suppress(sa.exc.OperationalError)
    with victim, shop.ledger.engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL deadlock_timeout = '60s'")  # the other one ends
        for job_id in held[-1:]:
            _lock(connection, job_id)
        end_s = time.monotonic() + DEADLOCK_LIMIT_S
        while held and not _deadlocked(members) and time.monotonic() < end_s:
            for job_id in _locked(shop, held[:-1]):
                _lock(connection, job_id)
    hit = _deadlocked(members)
    return Observed(batch, hit=hit, recovered=_recorded(shop, batch, shop.now_us()))


def not_serialized(shop: Shop, rng: random.Random, count: int) -> Observed:
    """Workers in REPEATABLE READ, and somebody who writes the same rows."""
    url = shop.ledger.engine.url.update_query_dict(
        {"options": "-c default_transaction_isolation=repeatable\\ read"}
    )
    text = url.render_as_string(hide_password=False)
    members = shop.crew.ready(2, LORABATCH_DATABASE_URL=text)
    batch = shop.accept(rng, count)
    touch = sa.update(jobs).values(priority=jobs.c.priority)
    while left := _unended(shop, batch):
        with shop.ledger.engine.begin() as connection:
            some = jobs.c.job_id.in_(rng.sample(left, k=min(8, len(left))))
            # Locked in id order, as by all others: else this one may be a deadlock's victim.
            held = sa.select(jobs.c.job_id).where(some).order_by(jobs.c.job_id)
            connection.execute(held.with_for_update())
            connection.execute(touch.where(some))
        time.sleep(rng.uniform(0.0, 0.02))
    return Observed(batch, hit=any("SerializationFailure" in member.news() for member in members))


def commit_cut(shop: Shop, rng: random.Random, count: int) -> Observed:
    """The server commits, the worker hears nothing of it: three times."""
    proxy = shop.database_proxy
    assert proxy is not None
    shop.crew.ready(2, LORABATCH_DATABASE_URL=shop.proxied_database_url)
    before = proxy.commits_cut
    batch = shop.accept(rng, count)
    for cut in range(1, 4):
        proxy.cut_commit(rng.randint(1, 8))
        until("commit cut", lambda: proxy.commits_cut >= before + cut or not _open(shop, batch))  # noqa: B023
    proxy.cut_commit(0)
    hit = proxy.commits_cut > before
    return Observed(batch, hit=hit, recovered=_recorded(shop, batch, shop.now_us()))


def locked_often(shop: Shop, rng: random.Random, count: int) -> Observed:
    """SQLite's lock is taken again and again, each time for longer than a worker waits."""
    members = shop.crew.ready(2, FAULT_BUSY_S=LOCKS_BACK_OFF_S)
    batch = shop.accept(rng, count)
    done = threading.Event()
    lock = Lock(shop)
    for _ in range(4):
        lock.take()
        done.wait(rng.uniform(0.3, 0.8))
        lock.give()
        done.wait(rng.uniform(0.05, 0.4))
    lock.close()
    hit = any("database is locked" in member.news() for member in members)
    return Observed(batch, hit=hit, recovered=_recorded(shop, batch, shop.now_us()))


class Lock:
    """SQLite's write lock, from another connection."""

    def __init__(self, shop: Shop) -> None:
        path = shop.ledger.engine.url.database
        assert path is not None
        self._connection = sqlite3.connect(path, timeout=30.0, isolation_level=None)

    def take(self) -> None:
        self._connection.execute("BEGIN EXCLUSIVE")

    def give(self) -> None:
        self._connection.execute("ROLLBACK")

    def close(self) -> None:
        self._connection.close()


def _open(shop: Shop, batch: Batch) -> bool:
    return shop.ended(batch) < len(batch.jobs)


def _unended(shop: Shop, batch: Batch) -> list[str]:
    """Jobs that have not ended."""
    states = shop.ledger.states(batch.ids)
    return [job_id for job_id in batch.ids if states.get(job_id) in ("queued", "running")]


def _lock(connection: sa.Connection, job_id: str) -> None:
    connection.execute(sa.select(jobs.c.job_id).where(jobs.c.job_id == job_id).with_for_update())


def _locked(shop: Shop, job_ids: list[str]) -> set[str]:
    """Those of these whose row somebody else has."""
    query = sa.select(jobs.c.job_id).where(jobs.c.job_id.in_(job_ids))
    with shop.ledger.engine.begin() as connection:
        free = {row.job_id for row in connection.execute(query.with_for_update(skip_locked=True))}
    return set(job_ids) - free


def _deadlocked(members: list[Member]) -> bool:
    return any("DeadlockDetected" in member.news() for member in members)


def _recorded(shop: Shop, batch: Batch, since_us: int) -> Callable[[], list[float]]:
    """Until the first result that was written after that."""

    def recovered() -> list[float]:
        query = sa.select(results.c.recorded_us).where(results.c.recorded_us > since_us)
        rows = shop.rows(query, results.c.job_id, batch.ids)
        return [(min(row.recorded_us for row in rows) - since_us) / 1e6] if rows else []

    return recovered
