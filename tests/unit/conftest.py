"""A tiny checkpoint with adapters and engines, and a filled ledger, shared by all unit tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from transformers import AutoTokenizer

from lorabatch import Job, Ledger, Settings
from lorabatch.tables import usage_events
from tests.broker_desk import BrokerDesk
from tests.desk import WAIT_S, Desk, start
from tests.ended_jobs import JOBS, ended
from tests.hub_server import HubServer, serve
from tests.models import bundled_folder
from tests.scheduling import LAYOUT


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The bundled model's tokenizer."""
    return AutoTokenizer.from_pretrained(bundled_folder())


@pytest.fixture
def broker_desk(settings: Settings, valkey_url: str) -> Iterator[BrokerDesk]:
    """A consumer of both queues on the worker's transport."""
    desk = BrokerDesk(settings, valkey_url)
    yield desk
    desk.close()
    desk.app.close()


@pytest.fixture(scope="module")
def configured(tiny_adapters: dict[str, Path]) -> str:
    return ",".join(f"{name}={path}" for name, path in tiny_adapters.items())


@pytest.fixture(scope="module")
def desk(
    tiny_folder: Path, configured: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Desk]:
    """One engine for the tests that leave nothing behind."""
    made = start(tiny_folder, tmp_path_factory.mktemp("home"), configured)
    yield made
    assert made.engine.drain(WAIT_S) == []


@pytest.fixture
def own(tiny_folder: Path, configured: str, home: Path) -> Iterator[Desk]:
    """An engine for one test, which may break or stop it."""
    made = start(tiny_folder, home, configured)
    yield made
    made.engine.drain(0)


@pytest.fixture(params=["pages", "rows"])
def layout(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both block managers, one after the other, for `tests.scheduling.scheduler`."""
    LAYOUT["rows"] = request.param == "rows"
    yield request.param
    LAYOUT["rows"] = False


@pytest.fixture
def filled(ledger: Ledger) -> Ledger:
    """The ended jobs of `tests.ended_jobs`, one that is open and one that runs."""
    ledger.accept(
        [
            Job(job_id=row[0], tenant=row[1], adapter_id=row[2], batch_id=row[3], prompt="p")
            for row in JOBS
        ]
        + [Job(job_id="open", tenant="acme", prompt="p"), Job(job_id="runs", prompt="p")]
    )
    claims = ledger.claim([row[0] for row in JOBS], "me", 60)
    ledger.claim(["runs"], "me", 60)
    ledger.record([ended(claim) for claim in claims.values()])
    with ledger.engine.begin() as connection:
        for job_id, *_, when in JOBS:
            micros = round(when.timestamp() * 1e6)
            query = sa.update(usage_events).where(usage_events.c.job_id == job_id)
            connection.execute(query.values(occurred_us=micros))
    return ledger


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serve(tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture
def into(tmp_path: Path) -> Path:
    """Where a source brings an adapter's files."""
    return tmp_path / "into"
