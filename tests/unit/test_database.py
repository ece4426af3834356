"""Connections to the ledger's database: what is left of a client that is cut off."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from lorabatch import Job, Ledger, database
from lorabatch.database import connect, upgrade
from lorabatch.tables import jobs


def test_locks_of_a_client_that_went_silent_are_given_up(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upgrade(postgres_url)
    monkeypatch.setattr(database, "CLIENT_LOST_S", 1)
    ledger, silent = Ledger(connect(postgres_url)), connect(postgres_url)
    job = Job(prompt="x")
    ledger.accept([job])
    with silent.connect() as connection:
        connection.execute(sa.select(jobs).with_for_update())
        assert ledger.claim([job.job_id], "another", 30.0) == {}, "it skips what is locked"
        assert ledger.cancel([job.job_id]) == {job.job_id: "cancelled"}, "it waits for the lock"
        with pytest.raises(sa.exc.InternalError, match="idle-in-transaction timeout"):
            connection.execute(sa.select(jobs))
    silent.dispose()
    ledger.engine.dispose()
