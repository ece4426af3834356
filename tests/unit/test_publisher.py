"""The publisher and a backend that refuses: what goes back, what is called, and who waits."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from lorabatch import ErrorInfo, Result
from lorabatch_worker import publisher as publishing
from lorabatch_worker.delivery import Delivery
from lorabatch_worker.links import links_of
from lorabatch_worker.publisher import Publisher

WAIT_S = 30.0
DONE = Result(job_id="job", tenant="acme", adapter_id="pirate", state="succeeded", text="arr")
ERROR = ErrorInfo(code="oom", message="too large")
FAILED = DONE.model_copy(update={"state": "failed", "text": None, "error": ERROR})


class Bench:
    """A publisher whose backend refuses, and whose broker takes all links but those `refused`."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.refused: set[str] = set()
        self.stores: list[str] = []
        self.ended: list[str] = []
        self.back: list[tuple[str, float, str | None]] = []
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        conf = SimpleNamespace(result_expires=86_400)
        app: Any = SimpleNamespace(backend=self, conf=conf)
        self.publisher = Publisher(app, lambda call: call())

    def mark_as_done(self, task_id: str, *_: Any, **__: Any) -> None:
        self.stores.append(task_id)
        self.entered.set()
        assert self.go_on.wait(WAIT_S)
        raise redis.exceptions.OutOfMemoryError("command not allowed")

    mark_as_failure = mark_as_done

    def call(self, name: str) -> None:
        self.called.append(name)
        if name in self.refused:
            raise redis.exceptions.ConnectionError("refused")

    def delivery(self, task_id: str, *links: str, publish: bool = True) -> Delivery:
        request = {"id": task_id, "callbacks": list(links), "errbacks": list(links)}
        return Delivery(
            task_id,
            lambda _: self.ended.append(task_id),
            on_postponed=lambda *how: self.back.append((task_id, *how)),
            publish=publish,
            links=links_of(request),
        )

    def end(self, *deliveries: Delivery, result: Result = DONE) -> None:
        """Have these told, each on its own, and wait until they are."""
        self.publisher.start()
        for delivery in deliveries:
            self.publisher.put(_now(result), [delivery])
        self.publisher.close()
        assert self.publisher.join(WAIT_S)


def _now(result: Result) -> Result:
    return result.model_copy(update={"finished_us": round(time.time() * 1e6)})


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = Bench()
    monkeypatch.setattr(publishing, "PAUSE_S", 0.0)

    def calls(_app: Any, links: Any, _value: Any) -> Any:
        return [lambda name=name: bench.call(name) for name in links.callbacks]

    for name in ("after_success", "after_failure"):
        monkeypatch.setattr(publishing, name, calls)
    return bench


@pytest.mark.parametrize("result", [DONE, FAILED])
def test_links_that_were_called_are_not_called_again_for_the_result(
    bench: Bench, result: Result
) -> None:
    bench.end(bench.delivery("job", "save", "mail"), result=result)
    assert bench.called == ["save", "mail"]
    assert len(bench.stores) == publishing.TRIES
    assert (bench.ended, bench.back) == (["job"], [])


def test_a_link_that_was_refused_has_the_message_come_again(bench: Bench) -> None:
    bench.refused = {"mail"}
    bench.end(bench.delivery("job", "save", "mail"))
    assert bench.ended == []
    assert bench.back == [("job", publishing.AGAIN_S, None)], "a job that has ended is not retried"


def test_a_cancelled_job_with_links_comes_again(bench: Bench) -> None:
    bench.mark_as_revoked = bench.mark_as_done  # type: ignore[attr-defined]
    cancelled = DONE.model_copy(update={"state": "cancelled", "text": None})
    bench.end(bench.delivery("job", "save"), result=cancelled)
    assert (bench.called, bench.ended, len(bench.back)) == ([], [], 1)


def test_while_the_backend_rests_the_next_go_back_untried(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "BACKEND_REST_S", 1000.0)
    bench.end(bench.delivery("first"), bench.delivery("second", "save"))
    assert bench.stores == ["first"] * publishing.TRIES
    assert bench.called == [], "its links are called when it comes again"
    assert [name for name, *_ in bench.back] == ["first", "second"]


def test_one_that_cannot_go_back_is_tried_though_the_backend_rests(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "BACKEND_REST_S", 1000.0)
    refused = bench.delivery("refused")
    refused.on_postponed = None
    bench.end(bench.delivery("first"), refused)
    assert bench.stores == [*["first"] * publishing.TRIES, "refused"]
    assert bench.ended == ["refused"]


def test_what_nobody_waits_for_ends_past_a_backend_that_is_silent(bench: Bench) -> None:
    bench.go_on.clear()
    bench.publisher.start()
    bench.publisher.put(_now(DONE), [bench.delivery("job")])
    assert bench.entered.wait(WAIT_S)
    mixed = [bench.delivery("nobody-waits", publish=False), bench.delivery("waits")]
    bench.publisher.put(_now(DONE), mixed)
    assert bench.ended == ["nobody-waits"]
    bench.go_on.set()
    bench.publisher.close()
    assert bench.publisher.join(WAIT_S)
    assert bench.ended == ["nobody-waits"]
    assert [name for name, *_ in bench.back] == ["job", "waits"]
