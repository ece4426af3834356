"""Senders: each at least once under one id, later again if it fails, and none waits for others."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorabatch import Job, Ledger, Settings
from lorabatch.outbox import Outbox
from lorabatch.webhook_secrets import Secrets
from lorabatch_producer import webhook_sender
from lorabatch_producer.webhook_sender import WebhookSender, pause_s
from lorabatch_producer.webhooks import verify
from tests.played_worker import fails, run_queued, succeeds
from tests.receiver import OK, Post, answers, receiving, until

BUSY = b"HTTP/1.1 503 Busy\r\n\r\n"
FAST = {"webhook_private": True, "webhook_ports": (), "webhook_retry_s": 0.02, "lease_s": 1.0}


@pytest.fixture
def local(settings: Settings) -> Settings:
    return settings.model_copy(update=FAST)


@pytest.fixture
def secret(ledger: Ledger) -> str:
    return Secrets(ledger.engine).create("acme").secret


@pytest.fixture
def out(ledger: Ledger) -> Outbox:
    return Outbox(ledger.engine)


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook_sender, "LOOK_S", 0.02)


def ended(ledger: Ledger, url: str, *job_ids: str, **fields: Any) -> None:
    given = {"prompt": "hi", "tenant": "acme", "webhook": url, **fields}
    ledger.accept([Job.parse({"job_id": job_id, **given}) for job_id in job_ids])
    run_queued(ledger, lambda c: fails(c) if c.job.adapter_id == "broken" else succeeds(c))


def states(out: Outbox) -> dict[str, str]:
    return {row.subject: row.state for row in out.list()}


async def sent(ledger: Ledger, settings: Settings, true: Callable[[], bool]) -> None:
    """A sender works until it is true."""
    async with WebhookSender(ledger, settings):
        await asyncio.to_thread(until, true)


async def test_the_end_of_a_job_is_told_and_signed(
    ledger: Ledger, out: Outbox, local: Settings, secret: str
) -> None:
    with receiving() as there:
        url = f"http://127.0.0.1:{there.port}/hook"
        ended(ledger, url, "good", custom_id="line 1")
        ended(ledger, url, "bad", adapter_id="broken")
        await sent(ledger, local, lambda: set(states(out).values()) == {"delivered"})
    events = {}
    for post in there.posts:
        assert post.headers["content-type"] == "application/json"
        event = verify(secret, post.headers, post.body)
        events[event["data"]["job_id"]] = event
    assert len(there.posts) == 2
    good, bad = events["good"], events["bad"]
    assert good["type"] == "job.succeeded"
    assert good["timestamp"].endswith("Z")
    assert good["data"] | {"submitted_us": 0, "finished_us": 0} == {
        "job_id": "good",
        "tenant": "acme",
        "adapter_id": None,
        "adapter_version": None,
        "custom_id": "line 1",
        "batch_id": None,
        "state": "succeeded",
        "text": "None: hi",
        "finish_reason": "eos_token",
        "usage": {"prompt_tokens": 5, "output_tokens": 3, "cached_tokens": 2},
        "error": None,
        "submitted_us": 0,
        "finished_us": 0,
    }
    assert (bad["type"], bad["data"]["text"]) == ("job.failed", None)
    assert bad["data"]["error"]["code"] == "unknown_adapter"


async def test_one_that_fails_comes_again_under_the_same_id(
    ledger: Ledger, out: Outbox, local: Settings, secret: str
) -> None:
    moved = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n"
    with receiving(answers(BUSY, b"no HTTP\r\n\r\n", moved, OK)) as there:
        ended(ledger, f"http://127.0.0.1:{there.port}/", "j")
        await sent(ledger, local, lambda: states(out) == {"j": "delivered"})
    assert len(there.posts) == 4
    assert len({post.headers["webhook-id"] for post in there.posts}) == 1
    assert len({post.body for post in there.posts}) == 1
    for post in there.posts:
        assert verify(secret, post.headers, post.body)
    (row,) = out.list()
    assert (row.attempts, row.status, row.error) == (4, 204, None)


async def test_gone_is_the_last_one(
    ledger: Ledger, out: Outbox, local: Settings, secret: str
) -> None:
    with receiving(answers(b"HTTP/1.1 410 Gone\r\n\r\n")) as there:
        ended(ledger, f"http://127.0.0.1:{there.port}/", "j")
        await sent(ledger, local, lambda: states(out) == {"j": "failed"})
    (row,) = out.list("failed")
    assert (len(there.posts), row.status) == (1, 410)
    assert row.error == "the receiver answered 410: it wants no more of it"


@pytest.mark.parametrize(
    ("limits", "attempts"),
    [({"webhook_max_attempts": 3}, 3), ({"webhook_max_age_s": 1e-6}, 1)],
)
async def test_it_is_given_up_at_last_and_shown(
    ledger: Ledger, out: Outbox, local: Settings, secret: str, limits: dict[str, Any], attempts: int
) -> None:
    with receiving(answers(BUSY)) as there:
        ended(ledger, f"http://127.0.0.1:{there.port}/", "j")
        mine = local.model_copy(update=limits)
        await sent(ledger, mine, lambda: states(out) == {"j": "failed"})
    (row,) = out.list("failed")
    assert (len(there.posts), row.attempts) == (attempts, attempts)
    assert (row.status, row.error) == (503, "the receiver answered 503")


async def test_what_the_receiver_wishes_is_waited_for(
    ledger: Ledger, out: Outbox, local: Settings, secret: str
) -> None:
    later = b"HTTP/1.1 429 Slow\r\nRetry-After: 3600\r\n\r\n"
    with receiving(answers(later)) as there:
        ended(ledger, f"http://127.0.0.1:{there.port}/", "j")
        await sent(ledger, local, lambda: any(row.status == 429 for row in out.list()))
    (row,) = out.list()
    assert (row.state, len(there.posts)) == ("waiting", 1)
    assert row.due_us - row.since_us >= 3500 * 10**6


async def test_a_forbidden_url_is_not_connected_to_and_says_why(
    ledger: Ledger, out: Outbox, local: Settings, secret: str
) -> None:
    with receiving() as there:
        ended(ledger, f"https://localhost:{there.port}/", "j")
        strict = local.model_copy(update={"webhook_private": False, "webhook_max_attempts": 1})
        await sent(ledger, strict, lambda: states(out) == {"j": "failed"})
    (row,) = out.list()
    assert there.posts == []
    assert row.error.startswith("refused: the host is on a private network")
    assert "127.0.0.1" not in row.error


async def test_one_without_a_secret_waits_for_one(
    ledger: Ledger, out: Outbox, local: Settings
) -> None:
    with receiving() as there:
        ended(ledger, f"http://127.0.0.1:{there.port}/", "j")
        async with WebhookSender(ledger, local):
            await asyncio.to_thread(until, lambda: out.list()[0].error is not None)
            assert out.list()[0].error == "the tenant has no secret to sign it with"
            assert there.posts == []
            secrets = Secrets(ledger.engine)
            first = secrets.create("acme").secret
            second = secrets.rotate("acme").secret
            await asyncio.to_thread(until, lambda: states(out) == {"j": "delivered"})
    (post,) = there.posts
    for known in (first, second):
        assert verify(known, post.headers, post.body)


async def test_a_receiver_that_hangs_stops_no_other(
    ledger: Ledger, out: Outbox, local: Settings, secret: str
) -> None:
    over = threading.Event()

    def hang(connection: socket.socket, post: Post) -> None:
        over.wait()

    mine = local.model_copy(update={"webhook_senders": 4, "webhook_per_host": 2})
    with receiving(hang) as hanging, receiving() as there:
        try:
            hanging_ids, other_ids = ([f"{name}{n}" for n in range(20)] for name in "ab")
            ended(ledger, f"http://127.0.0.1:{hanging.port}/", *hanging_ids)
            ended(ledger, f"http://localhost:{there.port}/", *other_ids)
            async with WebhookSender(ledger, mine):
                await asyncio.to_thread(
                    until, lambda: {states(out)[one] for one in other_ids} == {"delivered"}
                )
                assert len(hanging.posts) == 2
        finally:
            over.set()
    # what was under way when the sender stopped is another's at once
    held = [row for row in out.list("waiting") if row.attempts]
    assert [row.error for row in held] == ["its sender was stopped"] * 2
    taken = out.take(100, lambda host: 100, 60)
    assert sorted(row.subject for row in taken) == sorted(hanging_ids)


async def test_senders_share_and_each_is_sent_once(
    ledger: Ledger, out: Outbox, local: Settings, secret: str
) -> None:
    with receiving() as there:
        ended(ledger, f"http://127.0.0.1:{there.port}/", *(f"j{n}" for n in range(30)))
        async with WebhookSender(ledger, local), WebhookSender(ledger, local):
            await asyncio.to_thread(until, lambda: out.counts()["waiting"] == 0)
    told = [json.loads(post.body)["data"]["job_id"] for post in there.posts]
    assert sorted(told) == sorted(f"j{n}" for n in range(30))


async def test_one_that_was_killed_is_followed_by_another(
    ledger: Ledger, out: Outbox, local: Settings, secret: str, tmp_path: Path
) -> None:
    url = ledger.engine.url.render_as_string(hide_password=False)
    given = {"home": local.home, "database_url": url, "webhook_private": "1"}
    more = {"webhook_ports": "any", "webhook_timeout_s": "1", "lease_s": "1"}
    env = {f"LORABATCH_{name.upper()}": str(value) for name, value in {**given, **more}.items()}
    command = [sys.executable, "-m", "lorabatch_producer.cli", "webhooks", "deliver"]
    killed: list[subprocess.Popen[bytes]] = []

    def answer(connection: socket.socket, post: Post) -> None:
        if killed[0].poll() is None:  # in the middle of the first one
            killed[0].kill()
            killed[0].wait()
        else:
            connection.sendall(OK)

    with receiving(answer) as there, (tmp_path / "log").open("wb") as log:
        ended(ledger, f"http://127.0.0.1:{there.port}/", "j")
        killed.append(subprocess.Popen(command, env={**os.environ, **env}, stdout=log, stderr=log))
        try:
            await asyncio.to_thread(there.wait, 1)
            assert states(out) == {"j": "waiting"}
            mine = local.model_copy(update={"webhook_timeout_s": 20.0})
            await sent(ledger, mine, lambda: states(out) == {"j": "delivered"})
        finally:
            killed[0].kill()
            killed[0].wait()
    assert len(there.posts) == 2
    assert len({post.headers["webhook-id"] for post in there.posts}) == 1


def test_pauses_grow_to_hours_and_differ() -> None:
    pauses = {n: [pause_s(n, 5.0) for _ in range(200)] for n in (1, 2, 3, 8, 9, 1000)}
    for attempts, longest in ((1, 5), (2, 15), (3, 45), (8, 10_935), (9, 21_600), (1000, 21_600)):
        assert longest / 2 <= min(pauses[attempts]) < max(pauses[attempts]) <= longest
