"""A worker whose broker is away: how often it asks, and for how long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from celery.worker.consumer import consumer as stock
from kombu.utils import functional

from lorabatch import Settings
from lorabatch_worker.app import make_worker_app
from lorabatch_worker.consumer import RECONNECT_S, JobConsumer

TRIES = 150


class _Enough(Exception):
    pass


def test_a_broker_that_is_away_is_asked_for_every_few_seconds_and_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.load(home=tmp_path, broker_url="redis://127.0.0.1:1/0", transport="stock")
    consumer = JobConsumer.__new__(JobConsumer)
    consumer.app = make_worker_app(settings)
    consumer.first_connection_attempt = False
    consumer.broker_connection_retry_attempt = 0
    waited_s = [0.0]

    def said(*_: Any) -> None:
        waited_s.append(0.0)
        if len(waited_s) > TRIES:
            raise _Enough

    def slept(seconds: float) -> None:
        waited_s[-1] += seconds

    monkeypatch.setattr(stock, "error", said)
    monkeypatch.setattr(functional, "sleep", slept)
    with consumer.app.connection_for_read() as connection, pytest.raises(_Enough):
        consumer.ensure_connected(connection)
    assert max(waited_s) == RECONNECT_S
    assert waited_s[1] < RECONNECT_S
