"""A request that is handed back: what monitors hear, and a channel that is gone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lorabatch_worker import request as requests
from lorabatch_worker.request import JobRequest
from lorabatch_worker.visibility import hide
from tests.broker_desk import BrokerDesk


def handed_back(broker_desk: BrokerDesk, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[str]]:
    """A request of a message that was delivered, and the events that it sends."""
    events: list[str] = []
    request = JobRequest.__new__(JobRequest)
    request.id = "a"
    request.acknowledged = False
    request._message, request._connection_errors = broker_desk.got[0], ()
    monkeypatch.setattr(JobRequest, "send_event", lambda _, name, **__: events.append(name))
    monkeypatch.setattr(requests, "task_ready", lambda _: None)
    return request, events


@pytest.mark.parametrize(("why", "told"), [("it waits", ["task-retried"]), (None, [])])
def test_what_is_handed_back_is_said_once_and_not_of_an_ended_job(
    broker_desk: BrokerDesk, monkeypatch: pytest.MonkeyPatch, why: str | None, told: list[str]
) -> None:
    broker_desk.send("a")
    broker_desk.run()
    request, events = handed_back(broker_desk, monkeypatch)
    for _ in range(2):
        request.hand_back(5.0, why)
    assert (events, request.acknowledged) == (told, True)


def test_on_a_channel_that_is_gone_it_is_over_all_the_same(
    broker_desk: BrokerDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker_desk.send("a")
    broker_desk.run()
    request, events = handed_back(broker_desk, monkeypatch)
    broker_desk.close()
    request.hand_back(5.0, "it waits")
    assert (events, request.acknowledged) == (["task-retried"], True)
    broker_desk.open(0)
    assert broker_desk.run() == ["a"], "the close had handed it back"


def test_a_stock_channel_that_fails_raises_nothing() -> None:
    def lost() -> Any:
        raise ConnectionError

    acked: list[str] = []
    qos = SimpleNamespace(_quick_ack=acked.append)
    channel = SimpleNamespace(
        closed=False, visibility_timeout=60, qos=qos, conn_or_acquire=lost, unacked_index_key="i"
    )
    hide(channel, "tag", 5.0)
    assert acked == ["tag"], "renewed no more"
