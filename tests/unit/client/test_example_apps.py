"""The apps of examples/, when the broker is down and when no more jobs may wait."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from lorabatch import Ledger
from lorabatch.tenants import Limits, Tenants
from tests.models import ROOT


@pytest.fixture
def _no_broker(home: Path, monkeypatch: pytest.MonkeyPatch, ledger: Ledger) -> None:
    monkeypatch.setenv("LORABATCH_HOME", str(home))
    monkeypatch.setenv("LORABATCH_BROKER_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("WEBHOOK_URL", "https://shop.example/hook")
    Tenants(ledger.engine).set(Limits("shop", max_queued=1))


def flask(app: dict[str, Any]) -> Any:
    return lambda: app["app"].test_client().post("/ask", data={"prompt": "Why?"})


def fastapi(app: dict[str, Any]) -> Any:
    return lambda: TestClient(app["app"]).post("/texts", json={"prompt": "Why?"})


@pytest.mark.usefixtures("_no_broker")
@pytest.mark.parametrize(("name", "asking"), [("flask_webhook", flask), ("fastapi_app", fastapi)])
def test_what_is_accepted_is_said_to_be(ledger: Ledger, name: str, asking: Any) -> None:
    app = runpy.run_path(str(ROOT / "examples" / name / "app.py"))
    ask = asking(app)
    assert ask().status_code == 202
    assert ledger.counts() == {"queued": 1}
    refused = ask()
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
    getattr(app["producer"], "producer", app["producer"]).close()
