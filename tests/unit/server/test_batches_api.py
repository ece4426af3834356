"""Batches over OpenAI's own client: from a file to its output, refused, listed, tidied."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import sqlalchemy as sa

from lorabatch import Ledger, Settings
from lorabatch.tables import files
from lorabatch_producer.server import batch_steps, batch_work
from tests.http_server import served
from tests.openai_client import CHAT_URL, batch_of, client_of, ended, line, lines_in
from tests.played_worker import by_adapter, working


def test_a_batch_from_its_file_to_its_output(client: openai.OpenAI, ledger: Ledger) -> None:
    sent = [line(n, model="broken" if n % 3 == 1 else "sql") for n in range(7)]
    made = batch_of(client, sent, metadata={"what": "größe"})
    assert (made.object, made.status, made.metadata) == ("batch", "validating", {"what": "größe"})
    with working(ledger, by_adapter):
        done = ended(client, made)
    assert done.status == "completed"
    assert done.request_counts is not None
    assert done.request_counts.model_dump() == {"total": 7, "completed": 5, "failed": 2}
    times = (done.created_at, done.in_progress_at, done.finalizing_at, done.completed_at)
    assert list(times) == sorted(t for t in times if t is not None)
    assert done.expires_at == done.created_at + 24 * 3600
    assert done.failed_at is done.expired_at is done.cancelling_at is done.cancelled_at is None
    good, bad = lines_in(client, done.output_file_id), lines_in(client, done.error_file_id)
    assert [one["custom_id"] for one in good] == ["0", "2", "3", "5", "6"]
    assert [one["custom_id"] for one in bad] == ["1", "4"]
    for one in good:
        assert one.keys() == {"id", "custom_id", "response", "error"}
        body = one["response"]["body"]
        assert (one["response"]["status_code"], one["error"]) == (200, None)
        assert (body["object"], body["model"]) == ("chat.completion", "sql")
        assert body["choices"][0]["message"]["content"] == f"sql: line {one['custom_id']}"
        assert body["usage"]["total_tokens"] == 8
    assert {one["error"]["code"] for one in bad} == {"unknown_adapter"}
    assert all(one["response"] is None for one in bad)
    assert ledger.counts() == {"succeeded": 5, "failed": 2}


def test_completions_have_their_own_endpoint(client: openai.OpenAI, ledger: Ledger) -> None:
    url = "/v1/completions"
    made = batch_of(client, [line("a", url, body={"model": "sql", "prompt": "one"})], url)
    with working(ledger):
        done = ended(client, made)
    assert (done.status, done.error_file_id) == ("completed", None)
    (one,) = lines_in(client, done.output_file_id)
    assert one["response"]["body"]["choices"][0]["text"] == "sql: one"


def test_the_output_is_a_file_that_expires(client: openai.OpenAI, ledger: Ledger) -> None:
    after = {"anchor": "created_at", "seconds": 7200}
    made = batch_of(client, [line(0)], output_expires_after=after)
    with working(ledger):
        done = ended(client, made)
    file = client.files.retrieve(done.output_file_id or "")
    assert (file.purpose, file.expires_at) == ("batch_output", file.created_at + 7200)
    assert file.bytes == len(client.files.content(file.id).content)
    assert client.files.list(purpose="batch_output").data == [file]


CHAT_LINE = line(0)
BAD_FILES: list[tuple[list[bytes], list[tuple[str, int | None]]]] = [
    ([], [("empty_file", None)]),
    ([b"", b"  "], [("empty_file", None)]),
    ([CHAT_LINE, b"\xff\xfe"], [("not_utf8", 2)]),
    ([b"no json", CHAT_LINE, b"[]"], [("not_json", 1), ("not_object", 3)]),
    ([CHAT_LINE, CHAT_LINE], [("duplicate_custom_id", 2)]),
    ([line("a", "/v1/embeddings")], [("invalid_job", 1)]),
    ([line("a", "/v1/completions", body={"model": "sql", "prompt": "x"})], [("wrong_url", 1)]),
    ([b'{"prompt": "x", "adapter_id": null, "tenant": "acme"}'], [("wrong_url", 1)]),
    ([line(n) for n in range(11)], [("too_many_lines", None)]),
    ([line(0, body={"a\x00\ud800" * 999: 1})], [("invalid_job", 1)]),
    ([line(0, body={"model": "sql", "messages": [], "cost": 1})], [("invalid_job", 1)]),
]


def test_a_file_with_a_bad_line_fails_whole(http_settings: Settings, ledger: Ledger) -> None:
    settings = http_settings.model_copy(update={"http_max_batch_lines": 10})
    with served(settings) as url, client_of(url) as client:
        made = [batch_of(client, sent) for sent, _ in BAD_FILES]
        for batch, (_, expected) in zip(made, BAD_FILES, strict=True):
            failed = ended(client, batch)
            assert failed.status == "failed"
            assert failed.failed_at is not None
            assert failed.errors is not None
            assert [(e.code, e.line) for e in failed.errors.data or ()] == expected
            assert failed.output_file_id is failed.error_file_id is None
        (error,) = failed.errors.data or ()
        assert (error.param, error.message) == (
            "body.cost",
            "body.cost: not supported, or no field at all (got 1); nothing is ignored, so "
            "remove it",
        )
    assert ledger.counts() == {}


def test_what_is_no_batch_is_refused(client: openai.OpenAI, ledger: Ledger) -> None:
    file = client.files.create(file=("x", CHAT_LINE), purpose="batch").id
    good = {
        "input_file_id": file,
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    for wrong, statuses in (
        ({"endpoint": "/v1/embeddings"}, (400, 422)),
        ({"completion_window": "1h"}, (400, 422)),
        ({"metadata": {"a": "x" * 513}}, (400, 422)),
        ({"metadata": {"a": "\x00"}}, (400, 422)),
        ({"priority": "high"}, (400, 422)),
        ({"input_file_id": "file-none"}, (404,)),
        ({"input_file_id": "file\x00"}, (404,)),
    ):
        with pytest.raises(openai.APIStatusError) as refused:
            client.post("/batches", body={**good, **wrong}, cast_to=object)
        assert refused.value.status_code in statuses, wrong
    assert client.batches.list().data == []


def test_a_new_batch_is_a_small_body(http: httpx.Client) -> None:
    """Each of its items may be an error, and a million took the server ten seconds."""
    for number, status in ((5000, 400), (20_000, 413)):
        answer = http.post("/v1/batches", json={f"field {n}": 1 for n in range(number)})
        assert answer.status_code == status
        assert len(answer.text) < 20_000
    longest = {f"{n:064}": "\u00e9" * 512 for n in range(16)}
    asked = {"input_file_id": "x", "endpoint": CHAT_URL, "completion_window": "24h"}
    assert http.post("/v1/batches", json={**asked, "metadata": longest}).status_code == 404


def test_a_key_makes_one_batch(url: str, client: openai.OpenAI) -> None:
    """So that a client may send again what was not answered."""
    files = [client.files.create(file=("x", CHAT_LINE), purpose="batch").id for _ in range(2)]

    def make(client: openai.OpenAI, file: str, what: str) -> str:
        return client.batches.create(
            input_file_id=file,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"what": what},
            extra_headers={"Idempotency-Key": "order 7"},
        ).id

    made = make(client, files[0], "a")
    assert make(client, files[0], "a") == made
    for file, what in ((files[1], "a"), (files[0], "b")):
        with pytest.raises(openai.ConflictError):
            make(client, file, what)
    with client_of(url, tenant="acme") as other:
        file = other.files.create(file=("x", CHAT_LINE), purpose="batch").id
        assert make(other, file, "a") != made
    assert ended(client, client.batches.cancel(made)).status == "cancelled"
    client.files.delete(files[0])
    assert make(client, files[0], "a") == made
    assert [batch.id for batch in client.batches.list()] == [made]


def test_batches_are_listed_in_pages(url: str, client: openai.OpenAI) -> None:
    made = [batch_of(client, [b"x"]).id for _ in range(5)]
    newest_first = made[::-1]
    assert [batch.id for batch in client.batches.list(limit=2)] == newest_first
    page = client.batches.list(limit=2, after=newest_first[1])
    assert ([b.id for b in page.data], page.has_more) == (newest_first[2:4], True)
    with client_of(url, tenant="acme") as other:
        assert other.batches.list().data == []
        for ask in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(openai.NotFoundError) as theirs:
                ask(made[0])
            with pytest.raises(openai.NotFoundError) as unknown:
                ask("batch_none")
            assert theirs.value.response.text == unknown.value.response.text.replace(
                "batch_none", made[0]
            )
        with pytest.raises(openai.NotFoundError):
            other.batches.list(after=made[0])
        mine = client.batches.retrieve(made[0]).input_file_id
        with pytest.raises(openai.NotFoundError):
            other.batches.create(
                input_file_id=mine, endpoint="/v1/chat/completions", completion_window="24h"
            )


def test_a_commit_that_fails_is_tried_again_and_written_once(
    client: openai.OpenAI,
    ledger: Ledger,
    http_settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch_work, "AFTER_ERROR_S", 0.05)
    change, failures = batch_steps.Held.change, []

    def sometimes(held: Any, values: Any, written: Any = ()) -> None:
        if "output_file_id" in values and len(failures) < 2:
            failures.append(values)
            if len(failures) == 2:
                change(held, values, written)
            raise OSError("as if the server had died before, or just after")
        change(held, values, written)

    monkeypatch.setattr(batch_steps.Held, "change", sometimes)
    made = batch_of(client, [line(n) for n in range(3)])
    with working(ledger):
        done = ended(client, made)
    assert (done.status, len(failures)) == ("completed", 2)
    assert [one["custom_id"] for one in lines_in(client, done.output_file_id)] == list("012")
    assert {path.name for path in http_settings.files_folder.iterdir()} == {
        *(file.id for file in client.files.list()),
    }
    assert len(client.files.list().data) == 2


def test_expired_files_are_removed(
    http_settings: Settings, ledger: Ledger, database: sa.Engine
) -> None:
    """But for the one that an open batch needs."""
    with served(http_settings) as url, client_of(url) as client:
        gone = client.files.create(file=("x", CHAT_LINE), purpose="batch").id
        made = batch_of(client, [CHAT_LINE])
    with database.begin() as connection:
        connection.execute(sa.update(files).values(expires_us=1))
    folder: Path = http_settings.files_folder
    left, new = folder / ".file-1.new", folder / ".file-2.new"
    for path in (left, new):
        path.touch()
    os.utime(left, (1, 1))
    with served(http_settings) as url, client_of(url) as client:
        while (folder / gone).exists() or left.exists():
            time.sleep(0.02)
        assert new.exists()
        with working(ledger):
            assert ended(client, made).status == "completed"
