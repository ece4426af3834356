"""A server, its ledger and a Hub, as the unit tests have them."""

from __future__ import annotations

from tests.unit.conftest import broker_desk, hub, into
from tests.unit.server.conftest import http, http_settings, ledger, url

__all__ = ["broker_desk", "http", "http_settings", "hub", "into", "ledger", "url"]
