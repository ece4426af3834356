"""Clients that read the ledger as their result backend, and a worker that publishes nothing."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult, ResultSet
from shop import Shop, wait_until

from lorabatch.errors import JobFailed
from lorabatch.queue import TASK_NAME

WAIT_S = 30


@pytest.fixture
def reader(any_shop: Shop) -> Iterator[Celery]:
    """A client of a shop whose worker leaves the results in the ledger."""
    any_shop.start(LORABATCH_RESULT_BACKEND_URL="lorabatch").wait_ready()
    app = Celery("reader", broker=any_shop.url, backend=address(any_shop), set_as_current=False)
    yield app
    app.backend.close()
    app.close()


def address(shop: Shop) -> str:
    return f"lorabatch+{shop.settings.resolved_database_url}"


def generate(app: Celery, **kwargs: Any) -> AsyncResult:
    return app.send_task(TASK_NAME, kwargs=kwargs)


def published(shop: Shop) -> list[bytes]:
    return list(shop.broker.scan_iter("celery-task-meta-*"))


def test_results_failures_and_revocations_without_a_key_in_redis(
    reader: Celery, any_shop: Shop
) -> None:
    good = generate(reader, prompt="hello")
    bad = generate(reader, prompt="fail please")
    refused = generate(reader, promt="x")
    long = generate(reader, prompt="x", sampling_params={"max_new_tokens": 20_000})
    assert good.get(timeout=WAIT_S)["state"] == "succeeded"
    assert good.state == "SUCCESS"
    with pytest.raises(JobFailed, match="^engine_fault: engine_fault$"):
        bad.get(timeout=WAIT_S)
    with pytest.raises(JobFailed, match="^invalid_job: .*promt: no such field"):
        refused.get(timeout=WAIT_S)
    wait_until("started", lambda: long.state == "STARTED")
    any_shop.ledger.cancel([long.id])
    with pytest.raises(TaskRevokedError):
        long.get(timeout=WAIT_S)
    many = ResultSet([generate(reader, prompt=f"job {i}") for i in range(20)], app=reader)
    assert [value["job_id"] for value in many.get(timeout=WAIT_S)] == [r.id for r in many.results]
    any_shop.wait_broker_empty()
    assert published(any_shop) == []


def test_a_link_is_called_by_a_worker_that_publishes_nothing(
    reader: Celery, any_shop: Shop
) -> None:
    prompt = {"prompt": "linked", "idempotency_key": "linked"}
    link = reader.signature(TASK_NAME, kwargs=prompt, immutable=True, task_id="linked")
    result = reader.send_task(TASK_NAME, kwargs={"prompt": "first"}, link=link)
    result.get(timeout=WAIT_S)
    assert AsyncResult("linked", app=reader).get(timeout=WAIT_S)["job_id"] == "linked"


def test_it_says_what_redis_says(running: Shop) -> None:
    reader = Celery("reader", broker=running.url, backend=address(running), set_as_current=False)
    good, bad = running.generate(prompt="hello"), running.generate(prompt="fail please")
    assert AsyncResult(good.id, app=reader).get(timeout=WAIT_S) == good.get(timeout=WAIT_S)
    told = [
        AsyncResult(bad.id, app=app).get(timeout=WAIT_S, propagate=False)
        for app in (reader, running.client)
    ]
    assert [(type(error), str(error)) for error in told] == [
        (JobFailed, "engine_fault: engine_fault")
    ] * 2
    reader.backend.close()
    reader.close()


CLIENT = """
    import sys
    from celery import Celery
    app = Celery("x", broker=sys.argv[1], backend=sys.argv[2])
    sent = app.send_task("lorabatch.generate", kwargs={"prompt": "hi"})
    assert sent.get(timeout=30)["state"] == "succeeded"
    assert not {"torch", "numpy", "transformers"} & set(sys.modules)
"""


def test_a_plain_app_names_it_by_its_address_alone(running: Shop) -> None:
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CLIENT), running.url, address(running)],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert run.returncode == 0, run.stderr
