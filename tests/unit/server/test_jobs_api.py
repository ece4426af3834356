"""Our own API over HTTP: accept, look, wait, cancel, and what is refused."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import httpx
import pytest

from lorabatch import Ledger
from lorabatch.tenants import Limits, Tenants
from tests.played_worker import working

JOB = {"prompt": "How many users?", "adapter_id": "sql", "max_new_tokens": 8}


def test_a_job_is_accepted_and_its_result_waited_for(http: httpx.Client, ledger: Ledger) -> None:
    accepted = http.post("/jobs", json=JOB)
    assert accepted.status_code == 202
    job_id = accepted.json()["job_id"]
    assert accepted.headers["location"] == f"/jobs/{job_id}"
    assert http.get(f"/jobs/{job_id}").json() == {"job_id": job_id, "state": "queued"}
    with working(ledger):
        ended = http.get(f"/jobs/{job_id}", params={"wait_s": 20}).json()
    assert ended["state"] == "succeeded"
    assert ended["result"] == ledger.results([job_id])[job_id].model_dump(
        mode="json", exclude_none=True
    )
    assert http.get(f"/jobs/{job_id}").json() == ended


def test_waiting_ends_though_the_job_does_not(http: httpx.Client) -> None:
    job_id = http.post("/jobs", json=JOB).json()["job_id"]
    assert http.get(f"/jobs/{job_id}", params={"wait_s": 0.05}).json()["state"] == "queued"


def test_who_waited_hears_where_the_job_is_then(http: httpx.Client, ledger: Ledger) -> None:
    job_id = http.post("/jobs", json=JOB).json()["job_id"]
    claim = threading.Timer(0.2, ledger.claim, ([job_id], "w", 60.0))
    claim.start()
    assert http.get(f"/jobs/{job_id}", params={"wait_s": 2.0}).json()["state"] == "running"
    claim.join()


def test_a_job_is_in_no_batch_that_somebody_else_may_have(
    http: httpx.Client, ledger: Ledger
) -> None:
    """It would keep that open, and spend its budget."""
    refused = http.post("/jobs", json={**JOB, "batch_id": "theirs"})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_job")
    assert "batch_id: batches are made with POST /v1/batches" in refused.json()["detail"]
    assert ledger.counts("theirs") == {}


def test_a_job_is_cancelled(http: httpx.Client) -> None:
    job_id = http.post("/jobs", json=JOB).json()["job_id"]
    assert http.delete(f"/jobs/{job_id}").json() == {"job_id": job_id, "state": "cancelled"}
    assert http.get(f"/jobs/{job_id}").json()["result"]["state"] == "cancelled"


def test_an_idempotency_key_names_one_job(http: httpx.Client, ledger: Ledger) -> None:
    key = {"Idempotency-Key": "order 7"}
    first = http.post("/jobs", json=JOB, headers=key)
    again = http.post("/jobs", json=JOB, headers=key)
    assert (again.status_code, again.json()) == (202, first.json())
    other = http.post("/jobs", json={**JOB, "prompt": "Another"}, headers=key)
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_conflict")
    assert ledger.counts() == {"queued": 1}


def test_what_can_be_no_jobs_id_is_not_there(http: httpx.Client) -> None:
    for job_id in ("%00", "a%00b", "%0A", "x" * 3000):
        for answer in (http.get(f"/jobs/{job_id}"), http.delete(f"/jobs/{job_id}")):
            assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")
            assert len(answer.text) < 500


def test_another_tenants_job_is_not_there(http: httpx.Client) -> None:
    mine = {"LoraBatch-Tenant": "acme"}
    job_id = http.post("/jobs", json=JOB, headers=mine).json()["job_id"]
    assert http.get(f"/jobs/{job_id}", headers=mine).status_code == 200
    for ask in (http.get, http.delete):
        theirs = ask(f"/jobs/{job_id}")
        unknown = ask("/jobs/none")
        assert theirs.status_code == unknown.status_code == 404
        assert theirs.text == unknown.text.replace("none", job_id)
    assert http.get(f"/jobs/{job_id}", headers=mine).json()["state"] == "queued"


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "exactly one of prompt and messages"),
        ({"prompt": ""}, "prompt is empty"),
        ({**JOB, "top_q": 1}, "top_q: no such field"),
        ({**JOB, "max_new_tokens": 10**9}, "max_new_tokens"),
        ({**JOB, "temperature": "hot"}, "temperature"),
        ({**JOB, "adapter_id": "../x"}, "adapter_id"),
        (
            {**JOB, "tenant": "acme"},
            "is 'default'; leave it out of the job, or say it in the header LoraBatch-Tenant",
        ),
        ([1], "body"),
    ],
)
def test_what_is_no_job_is_refused(
    http: httpx.Client, ledger: Ledger, body: Any, word: str
) -> None:
    refused = http.post("/jobs", json=body)
    assert refused.status_code == 422
    assert refused.headers["content-type"] == "application/problem+json"
    assert word in refused.json()["detail"]
    assert ledger.counts() == {}


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"prompt": NaN}', b"[" * 100_000])
def test_what_is_no_json_is_refused(http: httpx.Client, body: bytes) -> None:
    sent = http.post("/jobs", content=body, headers={"content-type": "application/json"})
    assert sent.status_code in (400, 422), sent.text


@pytest.mark.parametrize("path", ["/jobs", "/generate", "/v1/completions"])
def test_json_that_is_called_a_form_is_told_so(http: httpx.Client, path: str) -> None:
    """As curl's -d calls it."""
    form = {"content-type": "application/x-www-form-urlencoded"}
    refused = http.post(path, content=json.dumps(JOB), headers=form)
    assert refused.status_code in (400, 422)
    assert "the header content-type: application/json" in refused.text


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_beyond_the_limit_is_refused(
    http: httpx.Client, ledger: Ledger, announced: bool
) -> None:
    body = b'{"prompt": "' + b"x" * (17 << 20) + b'"}'
    content = body if announced else (body[i : i + 65536] for i in range(0, len(body), 65536))
    sent = http.post("/jobs", content=content, headers={"content-type": "application/json"})
    assert (sent.status_code, sent.json()["code"]) == (413, "body_too_large")
    assert ledger.counts() == {}


def test_a_full_queue_says_when_to_come_again(http: httpx.Client, ledger: Ledger) -> None:
    Tenants(ledger.engine).set(Limits(tenant="default", max_queued=2))
    answers = [http.post("/jobs", json=JOB) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [202, 202, 429]
    assert answers[2].json()["code"] == "queue_full"
    assert int(answers[2].headers["retry-after"]) > 0


async def test_many_at_once_are_each_answered_for_themselves(url: str, ledger: Ledger) -> None:
    """Good ones, bad ones and the same one, in whatever groups they are accepted."""
    async with httpx.AsyncClient(base_url=url, timeout=60.0) as client:

        async def post(number: int) -> httpx.Response:
            key = f"key {number % 100}"
            prompt = "other" if number == 150 else f"job {number % 100}"
            fields = {"prompt": prompt, "idempotency_key": key}
            return await client.post("/jobs", json=fields)

        await post(50)
        answers = await asyncio.gather(*map(post, range(200)))
    assert [n for n, a in enumerate(answers) if a.status_code != 202] == [150]
    assert answers[150].status_code == 409
    for number in range(100):
        if number != 50:
            assert answers[number].json()["job_id"] == answers[number + 100].json()["job_id"]
    assert ledger.counts() == {"queued": 100}


def test_it_says_that_it_is_there(http: httpx.Client) -> None:
    assert http.get("/healthz").json() == http.get("/readyz").json() == {"status": "ok"}


def test_what_is_not_there_is_a_problem_too(http: httpx.Client) -> None:
    answer = http.get("/nothing")
    assert (answer.status_code, answer.json()["status"]) == (404, 404)
    assert http.put("/jobs").status_code == 405


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_database_that_fails_is_told_and_no_prompt_is_logged(
    http: httpx.Client, ledger: Ledger, capfd: pytest.CaptureFixture[str]
) -> None:
    with ledger.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE jobs RENAME TO elsewhere")
    refused = http.post("/jobs", json={"prompt": "a secret"})
    assert (refused.status_code, refused.json()["code"]) == (503, "database_not_ready")
    assert "retry-after" in refused.headers
    said = capfd.readouterr()
    assert "no such table" in said.out + said.err
    assert "a secret" not in said.out + said.err
