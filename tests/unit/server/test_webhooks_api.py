"""Webhooks over HTTP: asked for with a job or a batch, refused before anything is accepted."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from lorabatch import Ledger, Settings
from lorabatch.keys import Keys
from lorabatch.outbox import Outbox
from lorabatch.webhook_secrets import Secrets
from lorabatch_producer.server import create_app
from lorabatch_producer.webhooks import verify
from tests.asking import asking
from tests.http_server import served
from tests.openai_client import batch_of, client_of, ended, line
from tests.played_worker import working
from tests.receiver import Receiver, receiving, until

JOB = {"prompt": "How many users?", "max_new_tokens": 8}
LOCAL = {"webhook_private": True, "webhook_ports": (), "webhook_retry_s": 0.02}


@pytest.fixture
def there() -> Iterator[Receiver]:
    with receiving() as there:
        yield there


def test_who_asks_for_it_hears_of_the_end_of_jobs_and_batches(
    http_settings: Settings, ledger: Ledger, there: Receiver
) -> None:
    hook = f"http://127.0.0.1:{there.port}/hook"
    with (
        served(http_settings.model_copy(update=LOCAL)) as url,
        httpx.Client(base_url=url, timeout=30.0) as http,
        client_of(url) as client,
    ):
        secret = http.post("/webhooks/secrets").json()["secret"]
        job_id = http.post("/jobs", json={**JOB, "webhook": hook}).json()["job_id"]
        made = batch_of(client, [line(1), line(2)], extra_body={"webhook": hook})
        refused = batch_of(client, [b"no json"], extra_body={"webhook": hook})
        with working(ledger):
            done, failed = ended(client, made), ended(client, refused)
            until(lambda: len(there.posts) == 3)
    events = [verify(secret, post.headers, post.body) for post in there.posts]
    said = {event["type"]: event["data"] for event in events}
    assert said["job.succeeded"]["job_id"] == job_id
    assert said["batch.completed"] == {
        "id": made.id,
        "tenant": "default",
        "status": "completed",
        "request_counts": {"total": 2, "completed": 2, "failed": 0},
        "output_file_id": done.output_file_id,
        "error_file_id": None,
        "metadata": None,
    }
    assert said["batch.failed"]["id"] == failed.id


async def test_what_could_not_be_delivered_is_not_accepted(
    http_settings: Settings, ledger: Ledger
) -> None:
    bad = {
        "http://hooks.example/": "wanted https, not http",
        "https://169.254.169.254/latest": "not one of the public",
        "https://[::ffff:127.0.0.1]/": "not one of the public",
        "https://10.0.0.1/": "private network",
        "https://hooks.example:22/": "wanted port 443, not 22",
        "http://a\\@b": "wanted https://HOST",
        "https://me:secret@hooks.example/": "wanted https://HOST",
    }
    async with asking(create_app(http_settings)) as http:
        no_secret = await http.post("/jobs", json={**JOB, "webhook": "https://hooks.example/"})
        Secrets(ledger.engine).create("default")
        answers = {
            text: await http.post("/jobs", json={**JOB, "webhook": url})
            for url, text in bad.items()
        }
        other = await http.post(
            "/jobs",
            json={**JOB, "webhook": "https://hooks.example/"},
            headers={"LoraBatch-Tenant": "acme"},
        )
        batch = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch |= {"input_file_id": "file-x", "webhook": "https://10.0.0.1/"}
        of_batch = await http.post("/v1/batches", json=batch)
        taken = await http.post("/jobs", json={**JOB, "webhook": "https://hooks.example/"})
    for refused in (no_secret, other):
        assert refused.status_code == 422
        assert "has no secret to sign it with; make one with POST /webhooks" in refused.text
    for text, answer in answers.items():
        assert answer.status_code == 422
        assert text in answer.json()["detail"]
    assert of_batch.status_code == 400
    assert "private network" in of_batch.json()["error"]["message"]
    assert taken.status_code == 202
    assert ledger.counts() == {"queued": 1}


async def test_the_openai_routes_refuse_it_by_name(http_settings: Settings, ledger: Ledger) -> None:
    async with asking(create_app(http_settings)) as http:
        chat = {"model": "x", "messages": [{"role": "user", "content": "hi"}]}
        body = {**chat, "webhook": "https://hooks.example/"}
        answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "webhook" in answer.json()["error"]["message"]


async def test_secrets_are_for_administrators(http_settings: Settings, ledger: Ledger) -> None:
    keys = Keys(ledger.engine)
    on = http_settings.model_copy(update={"http_keys": "on"})
    me = {"Authorization": f"Bearer {keys.create('acme')[1]}"}
    admin = {"Authorization": f"Bearer {keys.create('ops', scopes=['admin'])[1]}"}
    of_acme = {**admin, "LoraBatch-Tenant": "acme"}
    async with asking(create_app(on)) as http:
        for method in ("GET", "POST"):
            answer = await http.request(method, "/webhooks/secrets", headers=me)
            assert answer.status_code == 403
            assert "whsec_" not in answer.text
        first = await http.post("/webhooks/secrets", headers=of_acme)
        second = await http.post("/webhooks/secrets", headers=of_acme)
        listed = await http.get("/webhooks/secrets", headers=of_acme)
        theirs = await http.get("/webhooks/secrets", headers=admin)
    assert (first.status_code, second.status_code) == (201, 201)
    texts = [one["secret"] for one in listed.json()]
    assert texts == [second.json()["secret"], first.json()["secret"]]
    assert [one["expires_at"] is None for one in listed.json()] == [True, False]
    assert theirs.json() == []
    assert [one.secret for one in Secrets(ledger.engine).list("acme")] == texts


def test_the_client_can_ask_for_it(
    http_settings: Settings, ledger: Ledger, there: Receiver
) -> None:
    from lorabatch_producer import Producer

    secret = Secrets(ledger.engine).create("acme").secret
    hook = f"http://127.0.0.1:{there.port}/"
    with Producer(http_settings) as producer:
        job_id = producer.enqueue(prompt="hi", tenant="acme", webhook=hook)
    with served(http_settings.model_copy(update=LOCAL)), working(ledger):
        (post,) = there.wait(1)
        until(lambda: Outbox(ledger.engine).counts()["waiting"] == 0)
    assert verify(secret, post.headers, post.body)["data"]["job_id"] == job_id
