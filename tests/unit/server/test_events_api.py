"""A job's text over HTTP as it grows, from a worker process with the fake engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from lorabatch import Ledger, Settings
from lorabatch.queue import plain_url, resolve_broker
from lorabatch.streams import Piece, stream_key
from lorabatch_worker.text_sender import TextSender
from tests.played_worker import succeeds, working

TEXT = "None: How many users?"
JOB = {"prompt": "How many users?", "stream": True}


@pytest.fixture
def sender(http_settings: Settings) -> Iterator[TextSender]:
    made = TextSender(resolve_broker(http_settings))
    yield made
    made.close()


def events(http: httpx.Client, job_id: str, **headers: str) -> Iterator[tuple[str, str, Any]]:
    """(event, id, data) of each."""
    with http.stream("GET", f"/jobs/{job_id}/events", headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, str] = {}
        for line in answer.iter_lines():
            if line.startswith(":"):
                continue
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif fields:
                yield fields["event"], fields.get("id", ""), json.loads(fields["data"])
                fields = {}


def test_text_comes_as_it_grows_and_ends_with_the_result(
    http: httpx.Client, ledger: Ledger, sender: TextSender
) -> None:
    job_id = http.post("/jobs", json=JOB).json()["job_id"]
    seen = events(http, job_id)
    assert next(seen) == ("state", "", {"state": "queued"})
    for at in (0, 4):
        sender.send([Piece(job_id, at, TEXT[at : at + 4])])
        assert next(seen) == ("text", str(at + 4), {"at": at, "text": TEXT[at : at + 4]})
    with working(ledger):
        rest, (event, _, ended) = list(seen)
    assert rest == ("text", str(len(TEXT)), {"at": 8, "text": TEXT[8:]})
    assert (event, ended["state"], ended["result"]["text"]) == ("ended", "succeeded", TEXT)


def test_who_comes_again_gets_the_rest(
    http: httpx.Client, ledger: Ledger, sender: TextSender
) -> None:
    job_id = http.post("/jobs", json=JOB).json()["job_id"]
    sender.send([Piece(job_id, 0, TEXT[:6])])
    with working(ledger):
        found = list(events(http, job_id, **{"Last-Event-ID": "4"}))
    texts = [data for event, _, data in found if event == "text"]
    assert "".join(one["text"] for one in texts) == TEXT[4:]
    assert texts[0]["at"] == 4


def test_two_follow_one_job(http: httpx.Client, ledger: Ledger, sender: TextSender) -> None:
    job_id = http.post("/jobs", json=JOB).json()["job_id"]
    first = events(http, job_id)
    sender.send([Piece(job_id, 0, TEXT[:6])])
    assert [next(first)[0], next(first)[2]["text"]] == ["state", TEXT[:6]]
    second = events(http, job_id)
    assert [next(second)[0], next(second)[2]["text"]] == ["state", TEXT[:6]]
    sender.send([Piece(job_id, 6, TEXT[6:9])])
    assert next(first)[2] == next(second)[2] == {"at": 6, "text": TEXT[6:9]}
    with working(ledger):
        assert [event for event, _, _ in first] == [event for event, _, _ in second]


def test_a_job_that_was_run_again_and_not_alike_begins_anew(
    http: httpx.Client, ledger: Ledger, sender: TextSender
) -> None:
    job_id = http.post("/jobs", json=JOB).json()["job_id"]
    sender.send([Piece(job_id, 0, "Some other")])
    seen = events(http, job_id)
    assert [next(seen)[0], next(seen)[2]["text"]] == ["state", "Some other"]
    with working(ledger):
        assert next(seen)[2] == {"at": 0, "text": TEXT}


@pytest.mark.parametrize("lost", ["all", "the first", "stream"])
def test_pieces_that_are_lost_cost_no_text(
    http: httpx.Client, ledger: Ledger, sender: TextSender, lost: str
) -> None:
    """Or nobody asked for a stream."""
    job_id = http.post("/jobs", json={**JOB, "stream": lost != "stream"}).json()["job_id"]
    if lost == "the first":
        sender.send([Piece(job_id, 3, TEXT[3:7])])
    with working(ledger):
        found = list(events(http, job_id))
    assert "".join(data["text"] for event, _, data in found if event == "text") == TEXT
    assert found[-1][2]["result"]["text"] == TEXT


def test_a_job_that_fails_ends_its_stream(
    http: httpx.Client, ledger: Ledger, sender: TextSender
) -> None:
    fields = {**JOB, "adapter_id": "broken"}
    job_id = http.post("/jobs", json=fields).json()["job_id"]
    sender.send([Piece(job_id, 0, "So")])
    seen = events(http, job_id)
    assert [next(seen)[0], next(seen)[2]["text"]] == ["state", "So"]
    with working(ledger, lambda claim: succeeds(claim, state="failed", text=None)):
        ((event, _, ended),) = list(seen)
    assert (event, ended["state"]) == ("ended", "failed")


def test_nobody_elses_job_is_followed(http: httpx.Client) -> None:
    mine = {"LoraBatch-Tenant": "acme"}
    job_id = http.post("/jobs", json=JOB, headers=mine).json()["job_id"]
    assert http.get(f"/jobs/{job_id}/events").status_code == 404
    assert http.get("/jobs/none/events").status_code == 404


def test_a_stream_is_not_kept_for_ever(http_settings: Settings, sender: TextSender) -> None:
    import redis

    sender.send([Piece("j", 0, "text")])
    with redis.Redis.from_url(plain_url(resolve_broker(http_settings))) as client:
        assert 0 < client.ttl(stream_key("j")) <= 600
