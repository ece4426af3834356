"""Sending to a broker that goes away."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorabatch import Settings
from lorabatch.embedded import ensure_valkey, stop_valkey
from lorabatch.errors import QueueNotReady
from lorabatch.ledger import Message
from lorabatch.queue import make_app, send


def test_a_broker_that_goes_between_two_sends_is_not_ready(home: Path) -> None:
    """The connection is open and the queue declared, so that the messages are what fails."""
    app = make_app(Settings.load(home=home, broker_url=ensure_valkey(home)))
    send(app, "lorabatch", [Message("first", "default", None)])
    stop_valkey(home)
    with pytest.raises(QueueNotReady, match="did not take 1 messages"):
        send(app, "lorabatch", [Message("second", "default", None)])
    app.close()
