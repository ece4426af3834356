"""Messages that another worker may know: how often they are said, and how they end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery.exceptions import NotRegistered
from structlog.testing import capture_logs

from lorabatch import Settings
from lorabatch import queue as queues
from lorabatch_worker import consumer as consumers
from lorabatch_worker.consumer import JobConsumer
from tests.broker_desk import INDEX, BrokerDesk


class Bench:
    """A consumer's handling of unknown tasks, at a time of our own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        self.hidden: list[str] = []
        self.acked: list[str] = []
        self.failed: list[tuple[str, str]] = []
        monkeypatch.setattr(consumers, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        monkeypatch.setattr(consumers, "hide", lambda _, tag, __: self.hidden.append(tag))
        monkeypatch.setattr(JobConsumer.__base__, "__init__", lambda _: None)
        self.consumer = JobConsumer()
        self.consumer.app = SimpleNamespace(
            backend=SimpleNamespace(mark_as_failure=lambda *told: self.failed.append(told))
        )
        monkeypatch.setattr(
            self.consumer, "_acknowledge", lambda message: self.acked.append(message.delivery_tag)
        )

    def receive(self, tag: str) -> list[str]:
        """What is said of it."""
        message: Any = SimpleNamespace(
            headers={"id": f"id-{tag}"},
            delivery_tag=tag,
            channel=SimpleNamespace(visibility_timeout=60.0),
        )
        with capture_logs() as said:
            self.consumer.on_unknown_task(None, message, KeyError("no.such"))
        return [line["event"] for line in said]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def test_a_message_is_said_to_be_parked_once(bench: Bench) -> None:
    assert bench.receive("a") == ["message parked"]
    assert bench.receive("a") == []
    assert bench.receive("b") == ["message parked"]
    assert bench.hidden == ["a", "a", "b"]


def test_a_task_that_no_worker_has_fails_in_the_end(bench: Bench) -> None:
    bench.receive("a")
    bench.now_s = consumers.PARKED_MAX_S - 1
    bench.receive("a")
    bench.receive("later")
    assert (bench.acked, bench.failed) == ([], [])
    bench.now_s += 1
    assert bench.receive("a") == ["message failed: no worker has its task"]
    bench.receive("later")
    ((task_id, error),) = bench.failed
    assert (task_id, bench.acked) == ("id-a", ["a"])
    assert isinstance(error, NotRegistered)
    assert error.args == ("no.such",)


def test_a_pass_gives_out_a_bounded_number_of_messages(
    broker_desk: BrokerDesk, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker_desk.send(*"abcde")
    broker_desk.run()
    for message in broker_desk.got:
        consumers.hide(message.channel, message.delivery_tag, -1.0)
    broker_desk.run()
    monkeypatch.setattr(queues, "RESTORE_MAX", 2)
    app = queues.make_app(settings)
    left = []
    with app.connection_for_read() as connection:
        channel = connection.default_channel
        connection.transport.cycle.add(channel)
        channel._active_queues.append("lorabatch")
        for _ in range(3):
            connection.transport.cycle.maybe_restore_messages()
            left.append(broker_desk.server.zcard(INDEX))
        channel._active_queues.clear()
    assert left == [3, 1, 0]
