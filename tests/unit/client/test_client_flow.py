"""Sources of any length by the client: read as there is room, none lost, results as they come."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from lorabatch import Job, Ledger, Settings
from lorabatch.errors import (
    IdempotencyConflict,
    InvalidJob,
    JobNotFound,
    LoraBatchError,
    QueueFull,
    QueueNotReady,
    SettingsError,
    WaitTimeout,
)
from lorabatch.ledger import Outcome
from lorabatch.tenants import Limits, Tenants
from lorabatch_producer import Producer, sending, waiting
from tests.played_worker import by_adapter, run_queued, succeeds, working


class Prompts:
    """Without end, unless an error is given; counts how far it was read."""

    def __init__(self, count: int | None = None, error: Exception | None = None) -> None:
        self.read = 0
        self._count, self._error = count, error

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            if number == self._count:
                if self._error is not None:
                    raise self._error
                return
            self.read += 1
            yield {"prompt": f"p{number}"}


def numbers(results: Any) -> list[int]:
    return [int(result.text.removeprefix("None: p")) for result in results]


def test_a_source_without_end_is_read_as_far_as_there_is_room(
    producer: Any, ledger: Ledger
) -> None:
    source, told = Prompts(), list[str]()
    ids = producer.enqueue_each(source, max_in_flight=10, on_accepted=told.extend)
    first = [next(ids) for _ in range(10)]
    assert (source.read, ledger.counts()) == (10, {"queued": 10})
    run_queued(ledger)
    first.append(next(ids))
    assert (source.read, len(told), first) == (20, 20, told[:11]), "nine were not asked for yet"
    assert ledger.counts() == {"queued": 10, "succeeded": 10}


@pytest.mark.parametrize("ordered", [True, False])
def test_results_come_while_the_source_goes_on(
    producer: Any, ledger: Ledger, ordered: bool
) -> None:
    source = Prompts()
    results = producer.map(source, ordered=ordered, max_in_flight=8)
    with working(ledger):
        found = numbers(itertools.islice(results, 30))
    assert source.read <= 38
    assert found == list(range(30)) if ordered else len(set(found)) == 30


def test_the_order_is_kept_however_they_end(producer: Any, ledger: Ledger) -> None:
    told: list[str] = []
    results = producer.map(Prompts(3), ordered=True, idle_timeout_s=0.1, on_accepted=told.extend)
    with pytest.raises(WaitTimeout, match="3 jobs are open"):
        next(results)

    def backwards() -> None:
        while len(told) < 6:
            time.sleep(0.01)
        for job_id in told[::-1]:
            time.sleep(0.2)  # the flow sees one after the other
            claims = ledger.claim([job_id], "me", 60)
            ledger.record([Outcome(claim, succeeds(claim)) for claim in claims.values()])

    results = producer.map(Prompts(3), ordered=True, on_accepted=told.extend)
    thread = threading.Thread(target=backwards)
    thread.start()
    assert numbers(results) == [0, 1, 2]
    thread.join()


def test_a_job_that_is_asked_for_again_has_a_result_each_time(
    producer: Any, ledger: Ledger
) -> None:
    same = [{"prompt": f"p{n % 2}", "idempotency_key": f"k{n % 2}"} for n in range(6)]
    with working(ledger):
        assert numbers(producer.map(same, ordered=True, max_in_flight=4)) == [0, 1] * 3
        assert sorted(numbers(producer.map(same, max_in_flight=4))) == [0, 0, 0, 1, 1, 1]
    assert ledger.counts() == {"succeeded": 2}


def test_a_full_queue_is_waited_for(producer: Any, ledger: Ledger) -> None:
    Tenants(ledger.engine).set(Limits("default", max_queued=4))
    with working(ledger):
        assert len(producer.enqueue_many(Prompts(30), max_in_flight=100)) == 30
    told: list[str] = []
    run_queued(ledger)
    with pytest.raises(QueueFull, match="4 jobs may wait") as caught:
        list(producer.map(Prompts(), idle_timeout_s=0.1, on_accepted=told.extend))
    assert len(told) == 4
    assert caught.value.__notes__ == [
        f"the first 4 jobs of this call are accepted and stay so, up to job {told[-1]!r}"
    ]


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": ""},
        Job(prompt="other", idempotency_key="known"),
        OSError("the source is gone"),
    ],
)
def test_what_came_before_an_error_of_the_source_is_accepted_and_ends(
    producer: Any, ledger: Ledger, bad: Any
) -> None:
    known = producer.enqueue(prompt="known", idempotency_key="known")

    def source() -> Iterator[Any]:
        yield from Prompts(5)
        if isinstance(bad, Exception):
            raise bad
        yield bad
        yield {"prompt": "after it"}

    results, found = producer.map(source()), []
    expected = InvalidJob, IdempotencyConflict, OSError
    with working(ledger):
        found += [next(results) for _ in range(5)]
        with pytest.raises(expected) as caught:
            next(results)
    assert sorted(numbers(found)) == list(range(5))
    assert caught.value.__notes__[0].startswith("the first 5 jobs of this call are accepted")
    assert ledger.counts() == {"succeeded": 6}
    assert known not in {result.job_id for result in found}
    ids: list[str] = []
    with pytest.raises(expected):
        ids.extend(producer.enqueue_each(source()))
    assert ledger.counts() == {"succeeded": 6, "queued": 5}


def test_a_list_says_how_much_of_it_was_accepted(producer: Any, ledger: Ledger) -> None:
    told: list[str] = []
    with pytest.raises(InvalidJob) as caught:
        producer.enqueue_many([*Prompts(1000), {"prompt": ""}], on_accepted=told.extend)
    assert caught.value.__notes__ == [
        f"the first 1000 jobs of this call are accepted and stay so, up to job {told[-1]!r}"
    ]
    with pytest.raises(InvalidJob) as none:
        producer.enqueue_many([{"prompt": ""}])
    assert none.value.__notes__ == ["no job of this call was accepted"]


def test_a_broker_that_is_down_does_not_end_a_flow(
    producer: Any, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise QueueNotReady("no broker")

    monkeypatch.setattr(sending, "send", refuse)
    with working(ledger):
        assert len(producer.enqueue_many(Prompts(20), max_in_flight=8)) == 20


def test_no_room_at_all_is_refused(producer: Any) -> None:
    with pytest.raises(SettingsError, match="max_in_flight 0: wanted at least 1"):
        list(producer.map(Prompts(), max_in_flight=0))
    with pytest.raises(SettingsError, match="max_in_flight 0"):
        producer.enqueue_many(Prompts(), max_in_flight=0)
    with pytest.raises(WaitTimeout):
        producer.enqueue_many(Prompts(), idle_timeout_s=0)


def test_very_many_ids_are_looked_at_in_parts(
    producer: Any, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "LOOK_IDS", 3)
    ids = producer.enqueue_many(Prompts(11))
    ledger.claim(ids[:2], "me", 60)
    run_queued(ledger)
    ended = producer.as_completed(ids, timeout_s=0)
    assert {next(ended).job_id for _ in range(9)} == set(ids[2:])
    with pytest.raises(WaitTimeout, match="2 jobs are open"):
        next(ended)
    with pytest.raises(JobNotFound, match="nobody"):
        list(producer.as_completed([*ids[2:8], "nobody"]))


def test_the_results_of_a_batch(
    producer: Any, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorabatch_producer.pages.IDS", 2)
    mine = [{"prompt": f"p{n}", "batch_id": "b"} for n in range(5)]
    mine[0]["adapter_id"] = "broken"
    ids = producer.enqueue_many([*mine, {"prompt": "other"}])
    run_queued(ledger, by_adapter)
    producer.enqueue(prompt="open", batch_id="b")
    found = {result.job_id: result.state for result in producer.results("b")}
    assert found == dict.fromkeys(ids[1:5], "succeeded") | {ids[0]: "failed"}
    with pytest.raises(JobNotFound, match="'none'"):
        list(producer.results("none"))


def test_both_databases(make: Any, database: Any, home: Any) -> None:
    url = database.url.render_as_string(hide_password=False)
    producer, books = make(Settings.load(home=home, database_url=url)), Ledger(database)
    Tenants(database).set(Limits("default", max_queued=5))
    source = ({**job, "batch_id": "b"} for job in Prompts(30))
    with working(books):
        assert numbers(producer.map(source, ordered=True)) == list(range(30))
    assert sorted(numbers(producer.results("b"))) == list(range(30))


def test_threads_share_a_producer(settings: Settings, ledger: Ledger) -> None:
    found: dict[int, list[int]] = {}
    errors: list[LoraBatchError] = []

    def work(thread: int) -> None:
        try:
            found[thread] = numbers(producer.map(Prompts(20), ordered=True, max_in_flight=5))
        except LoraBatchError as error:
            errors.append(error)

    with Producer(settings) as producer, working(ledger):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (errors, found) == ([], {thread: list(range(20)) for thread in range(4)})
    assert ledger.counts() == {"succeeded": 80}
