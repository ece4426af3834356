"""Broker and database faults in mid-run: nothing lost, nothing twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from shop import Shop, check_exactly_once, wait_until

from lorabatch.database import now_us
from lorabatch.tables import results
from tests.postgres import maintenance


def some_ended(shop: Shop, count: int) -> None:
    wait_until(f"{count} ended", lambda: shop.ledger.counts().get("succeeded", 0) >= count)


def test_flushall_in_mid_run_loses_nothing(any_shop: Shop) -> None:
    shop = any_shop
    shop.start().wait_ready()
    accepted = shop.accept(300, tokens=10)
    some_ended(shop, 60)
    shop.broker.flushall()
    shop.wait_ended(300)
    check_exactly_once(shop, accepted)
    assert '"jobs sent again"' in shop.workers[0].text()
    shop.wait_broker_empty()


def test_a_lost_broker_connection_runs_nothing_twice(shop: Shop) -> None:
    worker = shop.start(LORABATCH_LEASE_S="30").wait_ready()
    accepted = shop.accept(150, tokens=40)
    for ended in (20, 60, 100):
        some_ended(shop, ended)
        killed = shop.broker.client_kill_filter(_type="normal", skipme=True)
        assert killed > 0, "no connection was there to be lost"
    shop.wait_ended(150)
    check_exactly_once(shop, accepted)
    assert set(shop.executions().values()) == {1}
    shop.wait_broker_empty()
    assert "Unrecoverable" not in worker.text()


def test_what_is_no_message_stops_no_worker(shop: Shop) -> None:
    shop.broker.lpush("lorabatch", b"hello", b"{}")
    worker = shop.start().wait_ready()
    accepted = shop.accept(20)
    shop.wait_ended(20)
    check_exactly_once(shop, accepted)
    shop.wait_broker_empty()
    assert shop.broker.lrange("lorabatch:unreadable", 0, -1) == [b"{}", b"hello"]
    assert worker.text().count('"message set aside: it cannot be read"') == 2


def test_kombus_own_transport_does_the_same(shop: Shop) -> None:
    worker = shop.start(LORABATCH_TRANSPORT="stock").wait_ready()
    accepted = shop.accept(60, tokens=10)
    some_ended(shop, 10)
    assert shop.broker.info("commandstats")["cmdstat_brpop"]["calls"] > 0
    worker.kill()
    shop.start(LORABATCH_TRANSPORT="stock")
    shop.wait_ended(60)
    check_exactly_once(shop, accepted)
    shop.wait_broker_empty()


@pytest.fixture
def admin(postgres_server: str) -> Iterator[sa.Connection]:
    with maintenance(postgres_server) as connection:
        yield connection


def test_a_database_outage_at_commit_acknowledges_nothing(
    postgres_shop: Shop, admin: sa.Connection
) -> None:
    shop = postgres_shop
    name = shop.ledger.engine.url.database
    worker = shop.start(LORABATCH_LEASE_S="60").wait_ready()
    accepted = shop.accept(40, tokens=60)
    some_ended(shop, 5)
    admin.exec_driver_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    admin.exec_driver_sql(
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
    )
    began_us = admin.scalar(sa.select(now_us()))
    # by the recorder: at a start, before its commit, or just after one that went through
    doing = ('"doing": "start"', '"doing": "record"', '"doing": "read"')
    wait_until("outage noticed", lambda: any(words in worker.text() for words in doing))
    acknowledged = {job.job_id for job in accepted} - shop.ids_in_broker()
    admin.exec_driver_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    shop.ledger.engine.dispose()
    shop.wait_ended(40)
    before = {row.job_id for row in shop.rows(results) if row.recorded_us <= began_us}
    assert acknowledged <= before < {job.job_id for job in accepted}
    check_exactly_once(shop, accepted)
    assert set(shop.executions().values()) == {1}
    shop.wait_broker_empty()
