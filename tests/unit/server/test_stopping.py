"""A server that stops, or whose database is away for a while, loses nobody's job and says where it
is."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from lorabatch import Ledger, Settings
from lorabatch.tables import jobs
from lorabatch_producer.server import outcomes
from tests.http_server import served
from tests.played_worker import working

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)
WAIT_S = 60.0
KEY = {"Idempotency-Key": "order 7"}
ASK: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "base", "prompt": "a"},
    "/v1/chat/completions": {"model": "base", "messages": [{"role": "user", "content": "a"}]},
    "/generate": {"inputs": "a"},
}
STREAMED = {
    "/v1/completions": {**ASK["/v1/completions"], "stream": True},
    "/generate_stream": {"inputs": "a"},
}


@pytest.fixture
def http_settings(http_settings: Settings) -> Settings:
    return http_settings.model_copy(
        update={"base_model": "base", "http_wait_s": WAIT_S, "drain_s": 0.2}
    )


def wait_for_jobs(ledger: Ledger, number: int) -> None:
    end_s = time.monotonic() + WAIT_S
    while sum(ledger.counts().values()) < number:
        assert time.monotonic() < end_s, f"only {ledger.counts()} of {number} came"
        time.sleep(0.02)


def test_who_waits_for_a_server_that_stops_is_told_where_the_job_is(
    http_settings: Settings, ledger: Ledger
) -> None:
    asked: dict[tuple[str, bool, bool], Future[httpx.Response]] = {}
    with ThreadPoolExecutor(12) as threads, served(http_settings) as url:
        for streamed, bodies in ((False, ASK), (True, STREAMED)):
            for path, body in bodies.items():
                for keyed in (False, True):
                    headers = {"Idempotency-Key": path} if keyed else {}
                    asked[path, streamed, keyed] = threads.submit(
                        httpx.post, url + path, json=body, headers=headers, timeout=WAIT_S
                    )
        wait_for_jobs(ledger, 9)  # that of completions with a key is asked for twice
        mine = ledger_ids(ledger)
        waits = threads.submit(httpx.get, f"{url}/jobs/{mine[0]}?wait_s=60", timeout=WAIT_S)
        events = threads.submit(httpx.get, f"{url}/jobs/{mine[0]}/events", timeout=WAIT_S)
        time.sleep(0.5)
    assert set(states(ledger)) == {"queued"}, "nothing was cancelled"
    for (path, streamed, keyed), future in asked.items():
        answer = future.result()
        if streamed:
            check_last_event(answer, path)
            continue
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5"), answer.text
        assert answer.headers["location"].removeprefix("/jobs/") in mine
        assert answer.headers["location"] in answer.text
        assert answer.headers.get("x-should-retry") == (None if keyed else "false")
        body = answer.json()
        code = body["error"]["code"] if path.startswith("/v1") else body["error_type"]
        assert code == ("server_stops" if path.startswith("/v1") else "overloaded")
    assert (waits.result().status_code, waits.result().json()["code"]) == (503, "server_stops")
    assert events.result().text.rstrip().startswith("event: state")
    assert "event: stopped" in events.result().text


def check_last_event(answer: httpx.Response, path: str) -> None:
    assert answer.status_code == 200
    last = json.loads(answer.text.rstrip().rpartition("data: ")[2])
    text = last["error"]["message"] if path.startswith("/v1") else last["error"]
    assert "this server stops and the job goes on; GET /jobs/" in text


def ledger_ids(ledger: Ledger) -> list[str]:
    with ledger.engine.connect() as connection:
        return [row.job_id for row in connection.execute(jobs.select())]


def states(ledger: Ledger) -> list[str]:
    with ledger.engine.connect() as connection:
        return [row.state for row in connection.execute(jobs.select())]


@contextmanager
def away(ledger: Ledger, table: str) -> Iterator[None]:
    """No statement about the table works."""
    with ledger.engine.begin() as connection:
        connection.exec_driver_sql(f"ALTER TABLE {table} RENAME TO elsewhere")
    yield
    with ledger.engine.begin() as connection:
        connection.exec_driver_sql(f"ALTER TABLE elsewhere RENAME TO {table}")


@pytest.mark.parametrize("path", list(ASK))
def test_a_database_that_comes_back_is_waited_for(
    http_settings: Settings, ledger: Ledger, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()
    monkeypatch.setattr(outcomes, "REST_S", 0.05)
    monkeypatch.setattr(outcomes.log, "warning", lambda *_, **__: failed.set())
    with ThreadPoolExecutor(1) as threads, served(http_settings) as url:
        answer = threads.submit(httpx.post, url + path, json=ASK[path], timeout=WAIT_S)
        wait_for_jobs(ledger, 1)
        with away(ledger, "results"):
            assert failed.wait(WAIT_S)
        with working(ledger):
            assert answer.result().status_code == 200
    assert states(ledger) == ["succeeded"]


def test_a_job_that_may_have_been_accepted_is_named(
    http_settings: Settings, ledger: Ledger
) -> None:
    with served(http_settings) as url, away(ledger, "jobs"):
        for path, body in {**ASK, "/jobs": {"prompt": "a"}}.items():
            answer = httpx.post(url + path, json=body, timeout=WAIT_S)
            assert (answer.status_code, answer.headers["x-should-retry"]) == (503, "false")
            assert f"GET {answer.headers['location']}: it may have been accepted" in answer.text
            assert "without an Idempotency-Key is another job" in answer.text
            again = httpx.post(url + path, json=body, headers=KEY, timeout=WAIT_S)
            assert again.status_code == 503
            assert {"location", "x-should-retry"}.isdisjoint(again.headers), "it may be repeated"
