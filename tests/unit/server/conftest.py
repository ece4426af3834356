"""A server and plain HTTP clients to it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest
import sqlalchemy as sa

from lorabatch import Ledger, Settings
from lorabatch.registry import SHARED, Registered, Registry
from tests.http_server import served
from tests.openai_client import client_of


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


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with client_of(url) as client:
        yield client


@pytest.fixture
def sql_adapter(ledger: Ledger) -> None:
    """One that everybody may use."""
    Registry(ledger.engine).add(Registered(SHARED, "sql", "1" * 64, "/a/sql", None, 8, 1, 0))
