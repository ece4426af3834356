"""A shop (broker, ledger, worker processes) for each system test."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from shop import Shop


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    """A shop on SQLite; no worker runs yet."""
    home = tmp_path / "home"
    home.mkdir()
    shop = Shop(home)
    yield shop
    shop.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def any_shop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shop]:
    """A shop on each database; no worker runs yet."""
    home = tmp_path / "home"
    home.mkdir()
    url = request.getfixturevalue("postgres_url") if request.param == "postgresql" else None
    shop = Shop(home, url)
    yield shop
    shop.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """A shop on SQLite with one worker, for all tests of a module."""
    shop = Shop(tmp_path_factory.mktemp("running"))
    shop.start().wait_ready()
    yield shop
    worker = shop.workers[0]
    assert worker.process.poll() is None, worker.text()
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0, worker.text()
    shop.close()


@pytest.fixture
def postgres_shop(postgres_url: str, tmp_path: Path) -> Iterator[Shop]:
    """A shop on PostgreSQL; no worker runs yet."""
    shop = Shop(tmp_path, postgres_url)
    yield shop
    shop.close()
