"""The schema gets newer while workers of this version run, stop and start, and producers accept."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from alembic import command

from lorabatch.database import migrate
from lorabatch.tables import job_attempts, jobs
from tests.faults.batch import Batch
from tests.faults.crew import STOP_LIMIT_S, Member
from tests.faults.observed import Observed
from tests.faults.shop import Shop
from tests.faults.waiting import until
from tests.later import later_config, newest

__all__ = ["migrated"]

FEW = 4
TOKENS = (20, 60)
LONGEST_READ = "SET LOCAL idle_in_transaction_session_timeout = '30s'"
WAITING = "SELECT count(*) FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'"


def migrated(shop: Shop, rng: random.Random, count: int) -> Observed:
    """Workers of before it and one of after it run side by side; one of the first stops. On
    PostgreSQL somebody reads all jobs meanwhile, and what waits for that stops nobody else."""
    members = shop.crew.ready(2)
    batch = shop.accept(rng, count, TOKENS)
    upgrade = _Upgrade(shop)
    with _long_read(shop):
        upgrade.start()
        if shop.database == "postgresql":
            until("it waits for a lock", lambda: _waits(shop))
            more = len(batch.jobs)
            until("jobs end meanwhile", lambda: _ended(shop, rng, batch) > more)
    while upgrade.is_alive():
        shop.accept(rng, FEW, TOKENS, into=batch)
    members.append(shop.crew.start().wait_ready())
    members[0].signal(signal.SIGTERM)
    until("old and new take jobs", lambda: all(_take(shop, rng, batch, m) for m in members[1:]))
    members[0].process.wait(STOP_LIMIT_S)
    shop.wait_ended(batch)
    failures = [m.owner for m in members if "database does not answer" in m.news()]

    def wrong() -> list[str]:
        command.downgrade(later_config(upgrade.url), newest())
        return upgrade.failed + [f"worker {owner} could not go on" for owner in failures]

    return Observed(batch, wrong=wrong)


class _Upgrade(threading.Thread):
    """As `lorabatch db upgrade` of the next release does it."""

    def __init__(self, shop: Shop) -> None:
        super().__init__(name="upgrade", daemon=True)
        self.url = shop.ledger.engine.url.render_as_string(hide_password=False)
        self.failed: list[str] = []

    def run(self) -> None:
        try:
            migrate(later_config(self.url))
        except Exception as error:  # noqa: BLE001 - told by the try
            self.failed.append(f"the upgrade failed: {type(error).__name__}: {error}")


@contextmanager
def _long_read(shop: Shop) -> Iterator[None]:
    with shop.ledger.engine.execution_options(read_only=True).begin() as connection:
        connection.execute(sa.select(sa.func.count()).select_from(jobs))
        if shop.database == "postgresql":  # or all would wait for ever where nothing goes on
            connection.exec_driver_sql(LONGEST_READ)
        yield


def _waits(shop: Shop) -> bool:
    with shop.ledger.engine.connect() as connection:
        return bool(connection.exec_driver_sql(WAITING).scalar())


def _ended(shop: Shop, rng: random.Random, batch: Batch) -> int:
    shop.accept(rng, FEW, TOKENS, into=batch)
    return shop.ended(batch)


def _take(shop: Shop, rng: random.Random, batch: Batch, member: Member) -> bool:
    """Whether this worker claimed one of the jobs since its start, or of those accepted now."""
    shop.accept(rng, FEW, TOKENS, into=batch)
    mine = sa.select(job_attempts.c.job_id).where(job_attempts.c.worker.contains(member.owner))
    return bool(shop.rows(mine, job_attempts.c.job_id, batch.ids))
