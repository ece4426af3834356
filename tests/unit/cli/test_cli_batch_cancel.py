"""Batches cancelled by the command line and by both clients, and what runs again afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from lorabatch import Ledger, Settings
from lorabatch.errors import JobNotFound
from lorabatch.tables import jobs
from lorabatch_producer import AsyncProducer, Producer
from lorabatch_producer.batch import submit
from tests.bad_inputs import short
from tests.command_line import Cli
from tests.played_worker import by_adapter, run_queued


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "lines"
    path.write_bytes(b"\n".join(short(prompt=f"p{n}") for n in range(4)))
    return path


def claim_one(ledger: Ledger) -> None:
    with ledger.engine.connect() as connection:
        job_id = connection.scalar(sa.select(sa.func.min(jobs.c.job_id)))
    assert ledger.claim([str(job_id)], "me", 60)


def test_what_waits_ends_and_what_runs_is_asked(cli: Cli, ledger: Ledger, lines: Path) -> None:
    batch_id = cli("batch", "submit", lines).stdout.split()[1]
    claim_one(ledger)
    assert cli("batch", "cancel", batch_id).stdout == "3 cancelled, 1 running ones asked to stop\n"
    assert ledger.counts(batch_id) == {"cancelled": 3, "running": 1}
    assert cli("batch", "cancel", batch_id).stdout == "0 cancelled, 1 running ones asked to stop\n"
    assert "'nothing'" in cli("batch", "cancel", "nothing", code=2).stderr


def test_the_same_file_runs_what_was_cancelled_again(cli: Cli, ledger: Ledger, lines: Path) -> None:
    first = cli("batch", "submit", lines).stdout
    assert "run again" not in first
    cli("batch", "cancel", first.split()[1])
    again = cli("batch", "submit", lines).stdout
    assert again == f"{first}4 of them run again: they had failed or were cancelled\n"
    assert cli("batch", "submit", lines).stdout == first, "they wait already"
    assert ledger.counts(first.split()[1]) == {"queued": 4}


def test_what_fails_while_it_is_submitted_does_not_run_again(
    ledger: Ledger, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "broken"
    path.write_bytes(short(adapter_id="broken"))
    accept = Ledger.accept

    def accept_and_run(self: Ledger, *given: object, **more: object) -> dict[str, str]:
        known = accept(self, *given, **more)  # type: ignore[arg-type]
        run_queued(ledger, by_adapter)
        return known

    monkeypatch.setattr(Ledger, "accept", accept_and_run)
    with Producer(settings) as producer:
        assert submit(producer, path).again == 0
        assert ledger.counts() == {"failed": 1}
        assert submit(producer, path).again == 1
    assert ledger.counts() == {"failed": 1, "queued": 1}


async def test_both_clients(ledger: Ledger, settings: Settings, lines: Path) -> None:
    with Producer(settings) as producer:
        batch_id = submit(producer, lines).batch_id
        claim_one(ledger)
        assert producer.cancel_batch(batch_id) == {"cancelled": 3, "asked": 1}
    async with AsyncProducer(settings) as client:
        assert await client.cancel_batch(batch_id) == {"cancelled": 0, "asked": 1}
        with pytest.raises(JobNotFound, match="'nothing'"):
            await client.cancel_batch("nothing")
