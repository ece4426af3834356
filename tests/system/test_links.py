"""Links, errbacks and chains of plain Celery clients, called by a real worker."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from celery import chain, group
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult
from shop import Shop, wait_until

from lorabatch.errors import JobFailed
from lorabatch.queue import TASK_NAME

WAIT_S = 30


def generate(shop: Shop, prompt: str, task_id: str | None = None, **options: Any) -> AsyncResult:
    task_id = task_id or str(uuid.uuid4())
    return shop.client.send_task(TASK_NAME, kwargs={"prompt": prompt}, task_id=task_id, **options)


def task(shop: Shop, name: str, *args: Any, **options: Any) -> Any:
    """A signature with an id of its own, and who waits for it."""
    options["task_id"] = str(uuid.uuid4())
    signature = shop.client.signature(f"tests.{name}", args, options=options)
    return signature, AsyncResult(options["task_id"], app=shop.client)


def stored(shop: Shop, job_id: str) -> dict[str, Any]:
    return shop.ledger.results([job_id])[job_id].model_dump(mode="json")


def test_a_link_gets_the_result_and_is_its_child(running: Shop) -> None:
    result = generate(running, "x", link=running.client.signature("tests.keep", (7,)))
    value = result.get(timeout=WAIT_S)
    (child,) = result.children
    assert child.get(timeout=WAIT_S) == [value, 7]
    assert value == stored(running, result.id)


def test_a_link_gets_what_nobody_waits_for(running: Shop) -> None:
    link, linked = task(running, "keep")
    result = generate(running, "x", ignore_result=True, countdown=0.1, link=link)
    assert linked.get(timeout=WAIT_S) == [stored(running, result.id)]
    assert running.broker.get(f"celery-task-meta-{result.id}") is None


def test_several_links_and_a_group(running: Shop) -> None:
    links = [task(running, "keep", i) for i in range(4)]
    (first, one), (second, two), (third, three), (fourth, four) = links
    result = generate(running, "x", link=[first, second, group(third, fourth)])
    value = result.get(timeout=WAIT_S)
    got = [linked.get(timeout=WAIT_S) for linked in (one, two, three, four)]
    assert got == [[value, i] for i in range(4)]


def test_a_chain_runs_to_its_end(running: Shop) -> None:
    client = running.client
    steps = [client.signature(TASK_NAME, kwargs={"prompt": p}, immutable=True) for p in "ab"]
    last = chain(*steps, client.signature("tests.keep", (1,)), app=client).apply_async()
    value, one = last.get(timeout=WAIT_S)
    assert one == 1
    assert value == last.parent.get(timeout=WAIT_S) == stored(running, last.parent.id)
    first = last.parent.parent
    assert first.get(timeout=WAIT_S)["text"] != value["text"]
    running.wait_broker_empty()


def test_a_chain_stops_at_a_failure(running: Shop) -> None:
    client = running.client
    failing = client.signature(TASK_NAME, kwargs={"prompt": "fail please"})
    last = chain(failing, client.signature("tests.keep"), app=client).apply_async()
    with pytest.raises(JobFailed, match="engine_fault"):
        last.get(timeout=WAIT_S)
    running.wait_broker_empty()
    assert AsyncResult(last.id, app=client).state == "FAILURE", "the rest of a chain fails with it"


@pytest.mark.parametrize("kwargs", [{"prompt": "fail please"}, {"promt": "x"}])
def test_errbacks_of_both_styles(running: Shop, kwargs: dict[str, Any]) -> None:
    errback, called = task(running, "warned")
    link, linked = task(running, "keep")
    result = running.client.send_task(
        TASK_NAME, kwargs=kwargs, link=link, link_error=[errback, task(running, "noted")[0]]
    )
    with pytest.raises(JobFailed) as failed:
        result.get(timeout=WAIT_S)
    assert called.get(timeout=WAIT_S) == result.id
    noted = AsyncResult(f"noted-{result.id}", app=running.client)
    assert noted.get(timeout=WAIT_S) == str(failed.value)
    running.wait_broker_empty()
    assert linked.state == "PENDING"


def test_a_cancelled_job_calls_nothing(running: Shop) -> None:
    link, linked = task(running, "keep")
    errback, called = task(running, "warned")
    result = running.client.send_task(
        TASK_NAME,
        kwargs={"prompt": "x", "sampling_params": {"max_new_tokens": 20_000}},
        link=link,
        link_error=errback,
    )
    wait_until("running", lambda: result.id in running.ledger.states([result.id]))
    running.ledger.cancel([result.id])
    with pytest.raises(TaskRevokedError):
        result.get(timeout=WAIT_S)
    running.wait_broker_empty()
    assert (linked.state, called.state) == ("PENDING", "PENDING")


def test_what_is_delivered_again_calls_its_link_again(running: Shop) -> None:
    first, one = task(running, "keep", 1)
    second, two = task(running, "keep", 2)
    result = generate(running, "once", link=first)
    value = result.get(timeout=WAIT_S)
    generate(running, "once", result.id, link=second)
    assert one.get(timeout=WAIT_S) == [value, 1]
    assert two.get(timeout=WAIT_S) == [value, 2]
    assert running.executions()[result.id] == 1


def test_a_known_key_calls_the_link_of_who_gave_it(running: Shop) -> None:
    kwargs = {"prompt": "same", "idempotency_key": str(uuid.uuid4())}
    known = running.client.send_task(TASK_NAME, kwargs=kwargs).get(timeout=WAIT_S)
    link, linked = task(running, "keep")
    running.client.send_task(TASK_NAME, kwargs=kwargs, link=link)
    assert linked.get(timeout=WAIT_S) == [known]
