"""Links: what is sent or called when a job has ended, with what, and what happens if it fails."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from celery import Celery, chain, group
from celery.app.task import Context
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult
from kombu.exceptions import OperationalError

from lorabatch import ErrorInfo, Result
from lorabatch.errors import JobFailed
from lorabatch_worker import publisher as publishing
from lorabatch_worker.delivery import Delivery
from lorabatch_worker.links import links_of
from lorabatch_worker.publisher import Publisher

DONE = Result(job_id="job", tenant="acme", adapter_id="pirate", state="succeeded", text="arr")
ERROR = ErrorInfo(code="oom", message="too large")
FAILED = DONE.model_copy(update={"state": "failed", "text": None, "error": ERROR})
CANCELLED = DONE.model_copy(update={"state": "cancelled", "text": None})
VALUE = DONE.model_dump(mode="json")


class Bench:
    """A publisher, the broker that it sends to, and the backend that it stores in."""

    def __init__(self) -> None:
        queue = f"links-{uuid.uuid4()}"
        self.app = Celery("w", broker="memory://", backend="cache+memory://", set_as_current=False)
        self.app.conf.task_default_queue = queue
        self.ended: list[str] = []
        self.publisher = Publisher(self.app, lambda call: call())

    def end(self, result: Result, *deliveries: Delivery) -> None:
        """Have these told, and wait until they are."""
        self.publisher.start()
        self.publisher.put(result, deliveries)
        self.publisher.close()
        assert self.publisher.join(30)

    def delivery(self, task_id: str = "job", publish: bool = True, **links: Any) -> Delivery:
        """A message with links, as JSON brings them."""
        request = {"id": task_id, "root_id": "root", "task": "lorabatch.generate", **links}
        request |= {"delivery_info": {}, "ignore_result": not publish}
        return Delivery(
            task_id,
            lambda _: self.ended.append(task_id),
            publish=publish,
            links=links_of(json.loads(json.dumps(request))),
        )

    def task(self, name: str, *args: Any, **options: Any) -> Any:
        return self.app.signature(name, args, options=options)

    def sent(self) -> list[tuple[str, list[Any], Any]]:
        """What is in the queue: task, arguments, message."""
        with self.app.connection() as connection:
            queue = connection.SimpleQueue(self.app.conf.task_default_queue)
            messages = []
            while queue.qsize():
                message = queue.get(block=False)
                message.ack()
                messages.append((message.headers["task"], message.payload[0], message))
            queue.close()
        return messages

    def stored(self, task_id: str) -> AsyncResult:
        return AsyncResult(task_id, app=self.app)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.app.backend.client.cache.clear()  # a process has one
    bench.app.close()


def test_links_get_what_a_waiting_client_gets(bench: Bench) -> None:
    links = [bench.task("save", 7), bench.app.signature("mail", immutable=True)]
    bench.end(DONE, bench.delivery(callbacks=links))
    (save, saved, message), (mail, mailed, _) = bench.sent()
    assert (save, saved) == ("save", [VALUE, 7])
    assert (mail, mailed) == ("mail", [])
    assert (message.headers["parent_id"], message.headers["root_id"]) == ("job", "root")
    assert bench.stored("job").get(timeout=1) == VALUE
    assert bench.stored("job").children[0].id == message.headers["id"]
    assert bench.ended == ["job"]


def test_the_next_of_a_chain_gets_the_result_and_the_rest_of_it(bench: Bench) -> None:
    whole = chain(bench.task("one"), bench.task("two"), bench.task("three"))
    whole.freeze()
    _, two, three = whole.tasks
    bench.end(DONE, bench.delivery(chain=[three, two]))
    ((name, args, message),) = bench.sent()
    assert (name, args) == ("two", [VALUE])
    assert message.headers["id"] == two.options["task_id"]
    (rest,) = message.payload[2]["chain"]
    assert rest["task"] == "three"


def test_a_group_is_a_link_too(bench: Bench) -> None:
    queue = bench.app.conf.task_default_queue  # its members are of the process's default app
    both = group(*(bench.task(name, queue=queue) for name in "ab"), app=bench.app)
    bench.end(DONE, bench.delivery(callbacks=[both]))
    assert {(name, args[0]["text"]) for name, args, _ in bench.sent()} == {
        ("a", "arr"),
        ("b", "arr"),
    }


def test_nobody_needs_to_wait_for_a_result_that_a_link_gets(bench: Bench) -> None:
    bench.end(DONE, bench.delivery(publish=False, callbacks=[bench.task("save")]))
    assert [(name, args) for name, args, _ in bench.sent()] == [("save", [VALUE])]
    assert bench.stored("job").state == "PENDING"


def test_an_errback_gets_the_id_and_a_failed_chain_fails(bench: Bench) -> None:
    following = bench.task("two", task_id="second")
    blind = bench.app.signature("save", immutable=True)
    delivery = bench.delivery(callbacks=[blind], errbacks=[bench.task("warn")], chain=[following])
    bench.end(FAILED, delivery)
    ((name, args, message),) = bench.sent()
    assert (name, args) == ("warn", ["job"])
    assert message.headers["parent_id"] == "job"
    for task_id in ("job", "second"):
        with pytest.raises(JobFailed, match="^oom: too large$"):
            bench.stored(task_id).get(timeout=1)


def test_an_errback_is_called_for_a_failure_that_nobody_waits_for(bench: Bench) -> None:
    bench.end(FAILED, bench.delivery(publish=False, errbacks=[bench.task("warn")]))
    assert [(name, args) for name, args, _ in bench.sent()] == [("warn", ["job"])]
    assert bench.stored("job").state == "PENDING"


def test_an_errback_that_the_worker_knows_is_called_with_the_error(bench: Bench) -> None:
    called: list[tuple[Context, Exception, Any]] = []

    @bench.app.task(name="known")
    def known(request: Context, error: Exception, traceback: Any) -> None:
        called.append((request, error, traceback))

    @bench.app.task(name="raises")
    def raises(request: Context, error: Exception, traceback: Any) -> None:
        raise ValueError("not good")

    bench.end(FAILED, bench.delivery(errbacks=[bench.task("raises"), bench.task("known")]))
    ((request, error, traceback),) = called
    assert (request.id, request.task, traceback) == ("job", "lorabatch.generate", None)
    assert isinstance(error, JobFailed)
    assert bench.sent() == []
    assert bench.ended == ["job"]


def test_a_cancelled_job_calls_nothing(bench: Bench) -> None:
    tasks = [bench.app.signature("any", immutable=True)]
    bench.end(CANCELLED, bench.delivery(callbacks=tasks, errbacks=tasks, chain=tasks))
    assert bench.sent() == []
    with pytest.raises(TaskRevokedError):
        bench.stored("job").get(timeout=1)


def test_a_link_that_cannot_be_sent_stops_neither_the_others_nor_the_end(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[str] = []
    send = bench.app.send_task

    def noting(name: str, *args: Any, **options: Any) -> Any:
        tries.append(name)
        return send(name, *args, **options)

    monkeypatch.setattr(bench.app, "send_task", noting)
    links: list[Any] = [bench.task("bad", countdown="soon"), 5, bench.task("good")]
    bench.end(DONE, bench.delivery(callbacks=links))
    assert [name for name, _, _ in bench.sent()] == ["good"]
    assert tries == ["bad", "good"], "what cannot work is not tried again"
    assert bench.stored("job").get(timeout=1) == VALUE
    assert bench.ended == ["job"]


def away_for(bench: Bench, monkeypatch: pytest.MonkeyPatch, outages: int) -> list[str]:
    """The broker refuses the first so many calls: the names of what is sent, as it comes."""
    tries: list[str] = []
    send = bench.app.send_task

    def failing(name: str, *args: Any, **options: Any) -> Any:
        tries.append(name)
        if len(tries) <= outages:
            raise OperationalError("connection refused")
        return send(name, *args, **options)

    monkeypatch.setattr(bench.app, "send_task", failing)
    return tries


def test_a_broker_that_is_away_is_tried_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = away_for(bench, monkeypatch, publishing.TRIES - 1)
    bench.end(DONE, bench.delivery(callbacks=[bench.task("save")]))
    assert tries == ["save"] * publishing.TRIES
    assert len(bench.sent()) == 1
    assert bench.ended == ["job"]


@pytest.fixture
def full_backend(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no result."""

    class Full(type(bench.app.backend)):  # type: ignore[misc]
        def _store_result(self, *args: Any, **kwargs: Any) -> Any:
            raise redis.exceptions.OutOfMemoryError("command not allowed")

    monkeypatch.setattr(bench.app, "_get_backend", lambda: Full(app=bench.app, url="memory://"))


@pytest.mark.parametrize(
    ("age_s", "again_s"), [(0, 10.0), (60, 60.0), (10_000, 600.0), (90_000, None)]
)
@pytest.mark.usefixtures("full_backend")
def test_what_the_backend_refuses_comes_again_until_it_would_have_expired(
    bench: Bench, age_s: float, again_s: float | None
) -> None:
    bench.app.conf.result_expires = 86_400
    back: list[float] = []
    delivery = bench.delivery()
    delivery.on_postponed = lambda delay_s, why: back.append(delay_s)
    nobody = bench.delivery("nobody-waits", publish=False)
    nobody.on_postponed = delivery.on_postponed
    ended_us = round((time.time() - age_s) * 1e6)
    bench.end(DONE.model_copy(update={"finished_us": ended_us}), delivery, nobody)
    if again_s is None:
        assert (back, bench.ended) == ([], ["nobody-waits", "job"])
    else:
        assert back == [pytest.approx(again_s, abs=9.0)]
        assert bench.ended == ["nobody-waits"], "not acknowledged"


@pytest.mark.usefixtures("full_backend")
def test_errbacks_are_called_though_the_result_cannot_be_stored(bench: Bench) -> None:
    bench.end(FAILED, bench.delivery(errbacks=[bench.task("warn")]))
    assert [(name, args) for name, args, _ in bench.sent()] == [("warn", ["job"])]
    assert bench.ended == ["job"]


def test_copies_of_a_message_call_their_links_once_and_another_id_its_own(bench: Bench) -> None:
    copies = [bench.delivery(callbacks=[bench.task("save")]) for _ in range(2)]
    alias = bench.delivery("alias", callbacks=[bench.task("mail")])
    bench.end(DONE, *copies, alias, bench.delivery("plain"))
    assert sorted((name, m.headers["parent_id"]) for name, _, m in bench.sent()) == [
        ("mail", "alias"),
        ("save", "job"),
    ]
    assert sorted(bench.ended) == ["alias", "job", "job", "plain"]
    assert bench.stored("plain").get(timeout=1) == VALUE
