"""What clients send and what they get: plain Celery, our own messages, and broken ones."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
import uuid
from typing import Any

import pytest
from celery.result import AsyncResult
from shop import Shop, wait_until

from lorabatch import Job
from lorabatch.errors import JobFailed
from lorabatch.ledger import Message
from lorabatch.queue import TASK_NAME, send
from lorabatch.tables import jobs, results, usage_events

WAIT_S = 30


def rows_of(shop: Shop, job_id: str) -> list[int]:
    """How many job, result and usage rows an id has."""
    return [
        sum(row.job_id == job_id for row in shop.rows(table))
        for table in (jobs, results, usage_events)
    ]


def refused(result: AsyncResult) -> str:
    with pytest.raises(JobFailed) as error:
        result.get(timeout=WAIT_S)
    return str(error.value)


def publish(shop: Shop, body: bytes, content_type: str = "application/json", **headers: Any) -> str:
    """A hand-made message to our task; returns its task id."""
    task_id = str(uuid.uuid4())
    with shop.client.producer_pool.acquire() as producer:
        producer.publish(
            body,
            content_type=content_type,
            content_encoding="utf-8",
            exchange="",
            routing_key="celery",
            headers={"task": TASK_NAME, "id": task_id, "lang": "py", **headers},
        )
    return task_id


CLIENT = """
    import sys
    from celery import Celery
    app = Celery("x", broker=sys.argv[1], backend=sys.argv[1])
    fields = dict(prompt="hi there", adapter_id="pirate", sampling_params={"max_new_tokens": 3})
    good = app.send_task("lorabatch.generate", kwargs=fields)
    bad = app.send_task("lorabatch.generate", kwargs=dict(prompt="x", sampling_params={"top_p": 7}))
    got = good.get(timeout=30)
    assert got["state"] == "succeeded" and got["token_ids"] == [0, 1, 2], got
    assert got["text"].startswith("pirate|"), got
    try:
        bad.get(timeout=30)
    except Exception as error:
        assert "invalid_job" in str(error) and "sampling_params.top_p" in str(error), error
    else:
        raise SystemExit("the bad job was not refused")
    assert not [name for name in sys.modules if name.startswith("lorabatch")]
    print(good.id, bad.id)
"""


def test_a_plain_celery_app_gets_results_and_readable_errors(running: Shop) -> None:
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CLIENT), running.url],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    good, bad = run.stdout.split()
    assert rows_of(running, good) == rows_of(running, bad) == [1, 1, 1]
    assert running.ledger.states([good, bad]) == {good: "succeeded", bad: "failed"}
    (usage,) = [row for row in running.rows(usage_events) if row.job_id == bad]
    assert not usage.billable


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"promt": "x"}, "promt: no such field"),
        ({"prompt": "x", "colour": 1}, "colour: no such field"),
        ({"prompt": "x", "schema_version": 9}, "schema_version 9"),
        ({"prompt": "x", "job_id": "other"}, "job_id 'other' is not the task id"),
        ({"adapter_id": "pirate"}, "exactly one of prompt and messages"),
        ({"schema_version": 1, "tenant": "acme", "adapter_id": None}, "ledger has no such job"),
        ({"prompt": "x", "tenant": "no such tenant!"}, "tenant"),
    ],
)
def test_a_bad_job_is_refused_with_a_reason(
    running: Shop, kwargs: dict[str, Any], says: str
) -> None:
    result = running.generate(**kwargs)
    text = refused(result)
    assert says in text
    assert text.startswith("invalid_job: ")
    assert rows_of(running, result.id) == [1, 1, 1]


def test_positional_arguments_are_refused(running: Shop) -> None:
    result = running.client.send_task(TASK_NAME, args=["hello"])
    assert "1 positional arguments" in refused(result)


@pytest.mark.parametrize(
    ("option", "task", "says"),
    [
        ("chord", "tests.keep", "a chord is not supported"),
        ("link", "shop.save", "link: this worker has no task 'shop.save'"),
        ("link_error", "shop.warn", "link_error: this worker has no task 'shop.warn'"),
    ],
)
def test_what_would_never_be_called_is_refused(
    running: Shop, option: str, task: str, says: str
) -> None:
    signature = running.client.signature(task)
    result = running.client.send_task(TASK_NAME, kwargs={"prompt": "x"}, **{option: signature})
    assert says in refused(result)
    assert running.ledger.states([result.id]) == {result.id: "failed"}


def test_a_count_of_retries_and_a_far_expiry_change_nothing(running: Shop) -> None:
    result = running.client.send_task(
        TASK_NAME, kwargs={"prompt": "again"}, retries=3, expires=3600, priority=5
    )
    assert result.get(timeout=WAIT_S)["attempt"] == 1


def test_a_failed_job_raises_with_its_code(running: Shop) -> None:
    assert refused(running.generate(prompt="fail please")) == "engine_fault: engine_fault"


def test_the_same_key_gives_both_clients_the_same_result(running: Shop) -> None:
    key = str(uuid.uuid4())
    first = running.generate(prompt="same", idempotency_key=key)
    second = running.generate(prompt="same", idempotency_key=key)
    assert first.get(timeout=WAIT_S) == second.get(timeout=WAIT_S)
    assert rows_of(running, first.id)[1] + rows_of(running, second.id)[1] == 1


def test_the_same_key_with_another_prompt_is_that_clients_failure(running: Shop) -> None:
    key = str(uuid.uuid4())
    first = running.generate(prompt="one", idempotency_key=key)
    first.get(timeout=WAIT_S)
    second = running.generate(prompt="two", idempotency_key=key)
    assert refused(second).startswith("idempotency_conflict: ")
    assert rows_of(running, second.id) == [0, 0, 0]
    assert running.ledger.states([first.id]) == {first.id: "succeeded"}


@pytest.mark.parametrize(
    ("body", "content_type", "says"),
    [
        (b"\x80\x04K\x01.", "application/x-python-serialize", "ContentDisallowed"),
        (b'[[], {"prompt": ', "application/json", "cannot be read"),
        (b"5", "application/json", "not [args, kwargs, options]"),
        (b"[1, 2, 3]", "application/json", "not [args, kwargs, options]"),
        (b"{}", "application/json", "not [args, kwargs, options]"),
        (b'{"args": [], "kwargs": {}}', "application/json", "exactly one of prompt and messages"),
        (b"[[], [], {}]", "application/json", "a list and an object"),
        (b"\xff\xfe", "application/json", "cannot be read"),
    ],
)
def test_a_message_that_cannot_be_read_is_a_recorded_failure(
    running: Shop, body: bytes, content_type: str, says: str
) -> None:
    task_id = publish(running, body, content_type)
    assert says in refused(AsyncResult(task_id, app=running.client))
    assert rows_of(running, task_id) == [1, 1, 1]
    running.wait_broker_empty()


@pytest.mark.parametrize(
    "headers",
    [{"eta": "never"}, {"expires": [1]}, {"timelimit": 7}, {"timelimit": ["a", "b"]}],
)
def test_a_bad_header_is_a_recorded_failure(running: Shop, headers: dict[str, Any]) -> None:
    task_id = publish(running, json.dumps([[], {"prompt": "x"}, {}]).encode(), **headers)
    assert next(iter(headers)) in refused(AsyncResult(task_id, app=running.client))


@pytest.mark.parametrize(
    ("task", "task_id", "body"),
    [
        (TASK_NAME, None, b'[[], {"prompt": "x"}, {}]'),
        (TASK_NAME, "x" * 100, b'[[], {"prompt": "x"}, {}]'),
        ("tests.add", "side", b"5"),
        ("tests.add", None, b"[[1, 2], {}, {}]"),
    ],
)
def test_a_message_without_a_usable_id_or_task_does_not_stop_the_worker(
    running: Shop, task: str, task_id: str | None, body: bytes
) -> None:
    publish(running, body, task=task, id=task_id)
    running.wait_broker_empty()
    assert running.generate(prompt="still there").get(timeout=WAIT_S)["state"] == "succeeded"


def test_a_task_that_this_worker_does_not_know_stays_with_the_broker(running: Shop) -> None:
    publish(running, b'[[], {"secret": "hush"}, {}]', task="no.such.task", id="unknown")
    text = running.workers[0].text
    wait_until("parked", lambda: '"message parked"' in text())
    assert running.generate(prompt="still there").get(timeout=WAIT_S)["state"] == "succeeded"
    since_s = time.time()

    def noted_s() -> list[float]:
        return [at_s for _, at_s in running.broker.zrange("unacked_index", 0, -1, withscores=True)]

    wait_until("given out again", lambda: any(at_s > since_s for at_s in noted_s()))
    assert text().count('"message parked"') == 1, "said once"
    assert "no task 'no.such.task' here" in text()
    assert "unknown" in running.ids_in_broker()
    assert "hush" not in text()

    def taken_away() -> bool:
        running.broker.delete("unacked", "unacked_index")
        return running.in_broker() == {}

    wait_until("taken away", taken_away)


def test_duplicates_of_a_message_run_once(running: Shop) -> None:
    job = Job(prompt="once", sampling_params={"max_new_tokens": 50})
    running.ledger.accept([job])
    message = Message(job.job_id, job.tenant, job.adapter_id)
    send(running.producer, running.settings.queue, [message] * 5)
    wait_until("ended", lambda: running.ledger.results([job.job_id]))
    send(running.producer, running.settings.queue, [message] * 5)
    running.wait_broker_empty()
    assert running.executions()[job.job_id] == 1
    assert rows_of(running, job.job_id) == [1, 1, 1]


def test_only_who_asked_gets_a_published_result(running: Shop) -> None:
    quiet, loud = Job(prompt="quiet"), Job(prompt="loud")
    running.ledger.accept([quiet])
    running.ledger.accept([loud], publish_result=True)
    messages = [
        Message(quiet.job_id, "default", None),
        Message(loud.job_id, "default", None, publish_result=True),
    ]
    send(running.producer, running.settings.queue, messages)
    assert AsyncResult(loud.job_id, app=running.client).get(timeout=WAIT_S)["state"] == "succeeded"
    wait_until("ended", lambda: running.ledger.results([quiet.job_id]))
    running.wait_broker_empty()
    assert running.broker.get(f"celery-task-meta-{quiet.job_id}") is None


def test_a_redelivered_message_of_an_ended_job_publishes_again(running: Shop) -> None:
    result = running.generate(prompt="again")
    first = result.get(timeout=WAIT_S)
    running.broker.delete(f"celery-task-meta-{result.id}")
    running.client.send_task(TASK_NAME, kwargs={"prompt": "again"}, task_id=result.id)
    assert AsyncResult(result.id, app=running.client).get(timeout=WAIT_S) == first
    assert running.executions()[result.id] == 1


def test_no_prompt_reaches_the_log(running: Shop) -> None:
    secret = f"secret-{uuid.uuid4()}"
    running.generate(prompt=secret).get(timeout=WAIT_S)
    refused(running.generate(prompt=secret, colour=1))
    publish(running, f'[[], {{"prompt": "{secret}'.encode())
    running.wait_broker_empty()
    assert secret not in running.workers[0].text()
