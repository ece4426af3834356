"""A client follows a job's text as it grows, whatever the broker keeps of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lorabatch import Settings
from lorabatch.embedded import stop_valkey
from lorabatch.errors import JobFailed, JobNotFound, TextChanged, WaitTimeout
from lorabatch.queue import resolve_broker
from lorabatch.streams import Piece
from lorabatch_worker.text_sender import TextSender
from tests.played_worker import fails, run_queued

TEXT = "None: How many users?"


@pytest.fixture
def producer(make: Any, settings: Settings, valkey_url: str) -> Any:
    return make(settings)


@pytest.fixture
def sender(settings: Settings, valkey_url: str) -> Iterator[TextSender]:
    made = TextSender(resolve_broker(settings))
    yield made
    made.close()


@pytest.fixture
def job_id(producer: Any) -> str:
    return str(producer.enqueue(prompt="How many users?", stream=True))


def test_pieces_come_as_they_grow_and_make_up_the_text(
    producer: Any, ledger: Any, sender: TextSender, job_id: str
) -> None:
    pieces = producer.stream(job_id)
    for at in (0, 5, 10):
        sender.send([Piece(job_id, at, TEXT[at : at + 5])])
        assert next(pieces) == TEXT[at : at + 5]
    run_queued(ledger)
    assert list(pieces) == [TEXT[15:]]


def test_a_job_that_nobody_sent_pieces_of_gives_its_text_at_once(
    producer: Any, ledger: Any, job_id: str
) -> None:
    run_queued(ledger)
    assert list(producer.stream(job_id)) == [TEXT]


def test_a_broker_that_is_gone_costs_no_text(
    producer: Any, ledger: Any, settings: Settings, sender: TextSender, job_id: str
) -> None:
    sender.send([Piece(job_id, 0, TEXT[:5])])
    pieces = producer.stream(job_id)
    assert next(pieces) == TEXT[:5]
    stop_valkey(settings.home)
    run_queued(ledger)
    assert list(pieces) == [TEXT[5:]]


def test_another_text_is_an_error(
    producer: Any, ledger: Any, sender: TextSender, job_id: str
) -> None:
    sender.send([Piece(job_id, 0, "Some other")])
    pieces = producer.stream(job_id)
    assert next(pieces) == "Some other"
    run_queued(ledger)
    with pytest.raises(TextChanged, match=job_id):
        next(pieces)


def test_what_waiting_raises(producer: Any, ledger: Any, job_id: str) -> None:
    with pytest.raises(WaitTimeout):
        list(producer.stream(job_id, 0.05))
    run_queued(ledger, fails)
    with pytest.raises(JobFailed, match="unknown_adapter"):
        list(producer.stream(job_id))
    with pytest.raises(JobNotFound):
        list(producer.stream("none"))
