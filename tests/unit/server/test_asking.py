"""A request that stops waiting for its job, and what is no request at all, on foreign paths."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest

from lorabatch import Ledger, Settings
from lorabatch.tables import jobs
from lorabatch_producer.server.desk import Desk
from tests.http_server import served
from tests.played_worker import run_queued, working

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)
WAIT_S = 15.0
KEY = {"Idempotency-Key": "order 7"}
OPENAI, TGI = "/v1/completions", "/generate"
ASK = {OPENAI: {"model": "base", "prompt": "a"}, TGI: {"inputs": "a"}}


@pytest.fixture
def http_settings(http_settings: Settings) -> Settings:
    limits = {"http_max_body_bytes": 2000, "http_wait_s": 3 * WAIT_S}
    return http_settings.model_copy(update={"base_model": "base", **limits})


def states(ledger: Ledger) -> dict[str, str]:
    """By keys; `-` where a job has none."""
    with ledger.engine.connect() as connection:
        rows = list(connection.execute(jobs.select()))
    return {"-" if r.idempotency_key == r.job_id else r.idempotency_key: r.state for r in rows}


def test_a_client_that_goes_away_cancels_its_job(url: str, ledger: Ledger) -> None:
    """Not one that has a key to ask again with."""
    for headers in (KEY, {}):
        with httpx.Client(base_url=url) as leaving, pytest.raises(httpx.ReadTimeout):
            leaving.post(OPENAI, json=ASK[OPENAI], headers=headers, timeout=1.0)
    end_s = time.monotonic() + WAIT_S
    while states(ledger).get("-") != "cancelled" and time.monotonic() < end_s:
        time.sleep(0.02)
    assert states(ledger) == {"order 7": "queued", "-": "cancelled"}


@pytest.mark.parametrize("path", list(ASK))
def test_waiting_has_a_limit(http_settings: Settings, ledger: Ledger, path: str) -> None:
    short = http_settings.model_copy(update={"http_wait_s": 0.2})
    with served(short) as url, httpx.Client(base_url=url, timeout=60.0) as http:
        over = [http.post(path, json=ASK[path], headers=headers) for headers in (KEY, {})]
    assert [answer.status_code for answer in over] == [504, 504]
    assert "not ended after 0.2 s; it goes on" in over[0].text
    assert "not ended after 0.2 s; it was cancelled" in over[1].text
    assert states(ledger) == {"order 7": "queued", "-": "cancelled"}
    with served(http_settings) as url, working(ledger):
        again = httpx.post(url + path, json=ASK[path], headers=KEY, timeout=60.0)
    assert "None: a" in again.text
    assert states(ledger) == {"order 7": "succeeded", "-": "cancelled"}


def test_what_ended_after_the_last_look_is_answered(
    http_settings: Settings, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the ledger, and paid for."""

    async def missed(desk: Desk, job_id: str, timeout_s: float) -> None:
        await asyncio.to_thread(run_queued, ledger)
        await asyncio.sleep(timeout_s)

    monkeypatch.setattr(Desk, "outcome", missed)
    short = http_settings.model_copy(update={"http_wait_s": 0.2})
    with served(short) as url, httpx.Client(base_url=url, timeout=60.0) as http:
        answer = http.post(TGI, json=ASK[TGI])
    assert (answer.status_code, answer.json()) == (200, {"generated_text": "None: a"})


def message(answer: httpx.Response) -> str:
    """As its dialect has it; nothing else may be there."""
    body: Any = answer.json()
    if answer.request.url.path.startswith("/v1/"):
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
        return str(body["error"]["message"])
    assert set(body) == {"error", "error_type"}
    return str(body["error"])


def test_what_is_no_request_is_told_in_the_paths_dialect(
    http: httpx.Client, ledger: Ledger
) -> None:
    bodies: dict[bytes, str] = {
        b"": "body",
        b"{": "JSON",
        b"[1]": "dictionary",
        b"[" * 1000: "",
        b'"' + b"x" * 3000 + b'"': "wanted 2000 bytes at most",
        b'{"\\ud800": 1}': "\\ud800: not supported",
        b'{"' + b"y" * 1500 + b'": 1}': "y" * 80 + ": not supported",
    }
    as_json = {"content-type": "application/json"}
    for path, bad in ((OPENAI, 400), (TGI, 422)):
        for body, word in bodies.items():
            answer = http.post(path, content=body, headers=as_json)
            assert answer.status_code == (413 if len(body) > 2000 else bad), answer.text
            assert word in message(answer)
        assert http.put(path).status_code == 405
        message(http.put(path))
        whose = http.post(path, json=ASK[path], headers={"LoraBatch-Tenant": "a/b"})
        assert whose.status_code == bad
        assert message(whose).startswith("LoraBatch-Tenant: wanted")
    chat = b'{"model": "base", "messages": [{"role": "user", "\\ud800": 1}]}'
    half_a_letter = http.post("/v1/chat/completions", content=chat, headers=as_json)
    assert message(half_a_letter) == "messages.0.\\ud800: not supported; remove it"
    nothing = http.get("/v1/nothing")
    assert (nothing.status_code, nothing.json()["error"]["code"]) == (404, "not_found")
    assert states(ledger) == {}
