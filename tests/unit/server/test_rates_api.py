"""Limits of a minute over HTTP: refused before anything is accepted, and told in headers."""

from __future__ import annotations

import pytest

from lorabatch import Ledger, Settings, rates
from lorabatch.tenants import Limits, Tenants
from lorabatch_producer.server import create_app, rate_gate
from tests.asking import asking

JOB = {"prompt": "How many users?", "max_new_tokens": 10}  # 14 tokens
ME = {"LoraBatch-Tenant": "acme"}


@pytest.fixture(autouse=True)
def _one_long_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "MINUTE_US", 10**16)


async def test_two_servers_count_together(http_settings: Settings, ledger: Ledger) -> None:
    Tenants(ledger.engine).set(Limits("acme", requests_per_minute=3))
    one, other = create_app(http_settings), create_app(http_settings)
    async with asking(one) as here, asking(other) as there:
        answers = [await http.post("/jobs", json=JOB, headers=ME) for http in (here, there) * 2]
        free = await there.post("/jobs", json=JOB)
    assert [answer.status_code for answer in answers] == [202, 202, 202, 429]
    left = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
    assert left == ["2", "1", "0", "0"]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "3"
    assert "x-ratelimit-limit-tokens" not in answers[0].headers
    refused = answers[3]
    assert refused.json()["code"] == "rate_limited"
    assert refused.headers["retry-after"] + "s" == refused.headers["x-ratelimit-reset-requests"]
    assert int(refused.headers["retry-after"]) > rate_gate.LIMITS_S
    assert free.status_code == 202
    assert not [name for name in free.headers if name.startswith("x-ratelimit")]
    assert ledger.counts() == {"queued": 4}


async def test_tokens_are_counted_before_they_are_made(
    http_settings: Settings, ledger: Ledger
) -> None:
    Tenants(ledger.engine).set(Limits("acme", tokens_per_minute=30))
    async with asking(create_app(http_settings)) as http:
        answers = [await http.post("/jobs", json=JOB, headers=ME) for _ in range(3)]
        small = {"prompt": "x", "max_new_tokens": 1}
        fits = await http.post("/jobs", json=small, headers=ME)
    assert [answer.status_code for answer in (*answers, fits)] == [202, 202, 429, 202]
    left = [answer.headers["x-ratelimit-remaining-tokens"] for answer in (*answers, fits)]
    assert left == ["16", "2", "2", "0"]
    assert "28 are taken in this one, and this may take 14" in answers[2].json()["detail"]


async def test_a_limit_holds_for_servers_that_run(
    http_settings: Settings, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate_gate, "LIMITS_S", 0.0)
    tenants = Tenants(ledger.engine)
    async with asking(create_app(http_settings)) as http:
        assert (await http.post("/jobs", json=JOB, headers=ME)).status_code == 202
        tenants.set(Limits("acme", requests_per_minute=0))
        assert (await http.post("/jobs", json=JOB, headers=ME)).status_code == 429
        tenants.forget("acme")
        assert (await http.post("/jobs", json=JOB, headers=ME)).status_code == 202
