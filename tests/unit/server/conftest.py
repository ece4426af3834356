"""A server and plain HTTP clients to it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import sqlalchemy as sa

from lorabatch import Ledger, Settings
from tests.http_server import served


@pytest.fixture
def http_settings(settings: Settings, database: sa.Engine, valkey_url: str) -> Settings:
    """On the same database as `ledger`."""
    url = database.url.render_as_string(hide_password=False)
    return settings.model_copy(update={"database_url": url, "broker_url": valkey_url})


@pytest.fixture
def url(http_settings: Settings) -> Iterator[str]:
    with served(http_settings) as url:
        yield url


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30.0) as client:
        yield client


@pytest.fixture
def ledger(database: sa.Engine) -> Ledger:
    return Ledger(database)
