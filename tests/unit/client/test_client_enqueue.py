"""Enqueueing by the client against a real Valkey: checked, keyed, sent in chunks, none lost."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import redis

from lorabatch import Job, Ledger, Settings
from lorabatch.embedded import ensure_valkey, stop_valkey
from lorabatch.errors import IdempotencyConflict, InvalidJob, QueueNotReady
from lorabatch.feed import Feed
from lorabatch.queue import drained
from lorabatch_producer import NotSent, Producer
from lorabatch_producer.sending import SENT_MAX
from tests.played_worker import run_queued, working

DOWN = "redis://127.0.0.1:1/0"


def queue_length(settings: Settings) -> int:
    with redis.Redis.from_url(settings.broker_url or ensure_valkey(settings.home)) as client:
        lengths: list[Any] = [client.llen(name) for name in drained([settings.queue])]
    return sum(lengths)


def test_a_job_is_accepted_sent_and_waited_for(
    producer: Any, ledger: Ledger, settings: Settings
) -> None:
    job_id = producer.enqueue(
        adapter_id="sql", tenant="acme", prompt="how many?", max_new_tokens=7, temperature=0.7
    )
    assert queue_length(settings) == 1
    assert producer.result(job_id) is None
    with working(ledger):
        result = producer.wait(job_id)
    assert (result.text, result.tenant, result.job_id) == ("sql: how many?", "acme", job_id)
    assert producer.result(job_id) == result


def test_sampling_fields_may_be_flat_or_nested(producer: Any, ledger: Ledger) -> None:
    flat = producer.enqueue(prompt="a", temperature=0.5, stop="x", seed=3)
    nested = producer.enqueue({"prompt": "a", "sampling_params": {"temperature": 0.5}}, seed=3)
    ready = producer.enqueue(Job(prompt="a"))
    claims = ledger.claim([flat, nested, ready], "me", 60)
    params = {job_id: claim.job.sampling_params for job_id, claim in claims.items()}
    assert (params[flat].temperature, params[flat].stop, params[flat].seed) == (0.5, ("x",), 3)
    assert (params[nested].temperature, params[nested].seed) == (0.5, 3)
    assert params[ready] == Job(prompt="a").sampling_params


@pytest.mark.parametrize(
    ("job", "fields", "message"),
    [
        (None, {"prompt": "a", "temprature": 1}, "temprature: no such field"),
        (None, {"prompt": "a", "temperature": -1}, "sampling_params.temperature"),
        (
            {"prompt": "a", "sampling_params": {"seed": 1}},
            {"seed": 2},
            "seed: given flat and in sampling_params",
        ),
        ({"prompt": "a", "sampling_params": [1]}, {"seed": 2}, "sampling_params: must be an obj"),
        (Job(job_id="j", prompt="a"), {"seed": 2}, r"job 'j': give a Job or fields \(seed\)"),
        (["a"], {}, "must be a Job or a mapping of its fields, got a list of 1"),
        (None, {}, "exactly one of prompt and messages"),
    ],
)
def test_a_bad_job_is_refused_and_accepts_nothing(
    producer: Any, ledger: Ledger, job: Any, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidJob, match=message):
        producer.enqueue(job, **fields)
    assert ledger.counts() == {}


def test_the_same_key_is_one_job_and_one_message(
    producer: Any, ledger: Ledger, settings: Settings
) -> None:
    first = producer.enqueue(prompt="a", tenant="acme", idempotency_key="k")
    assert producer.enqueue(prompt="a", tenant="acme", idempotency_key="k") == first
    assert queue_length(settings) == 1
    with pytest.raises(IdempotencyConflict, match="'k' of tenant 'acme'"):
        producer.enqueue(prompt="b", tenant="acme", idempotency_key="k")
    run_queued(ledger)
    assert producer.enqueue(prompt="a", tenant="acme", idempotency_key="k") == first
    assert (queue_length(settings), ledger.counts()) == (1, {"succeeded": 1})


def test_many_jobs_are_sent_in_chunks_and_yielded_as_they_end(
    producer: Any, ledger: Ledger, settings: Settings
) -> None:
    wanted = ({"prompt": f"p{i}", "adapter_id": "sql"} for i in range(1_050))
    ids = producer.enqueue_many(wanted)
    assert len(set(ids)) == 1_050
    assert queue_length(settings) == SENT_MAX
    assert len(Feed(ledger.engine, settings.queue).take()) == 1_000 - SENT_MAX, "a full window"
    with working(ledger):
        texts = {result.job_id: result.text for result in producer.wait(ids)}
    assert texts == {job_id: f"sql: p{i}" for i, job_id in enumerate(ids)}


def test_no_jobs_at_all(producer: Any) -> None:
    assert producer.enqueue_many([]) == []
    assert list(producer.wait([])) == []


def test_a_bad_job_among_many_keeps_the_chunks_before_it(producer: Any, ledger: Ledger) -> None:
    asked = [{"prompt": "a"}] * 1000 + [{"prompt": "b"}, {"prompt": ""}]
    with pytest.raises(InvalidJob, match="prompt is empty"):
        producer.enqueue_many(asked)
    assert ledger.counts() == {"queued": 1000}


def test_the_same_key_within_one_call_is_one_job(producer: Any, settings: Settings) -> None:
    ids = producer.enqueue_many([{"prompt": "a", "idempotency_key": "k"}] * 3)
    assert len(ids) == 3
    assert len(set(ids)) == queue_length(settings) == 1


def test_a_broker_that_is_down_delays_jobs_and_loses_none(
    make: Any, ledger: Ledger, settings: Settings
) -> None:
    down = make(settings.model_copy(update={"broker_url": DOWN}))
    with pytest.raises(
        NotSent, match=r"is accepted, but not in the queue yet.*workers send"
    ) as caught:
        down.enqueue(prompt="a")
    assert isinstance(caught.value, QueueNotReady)
    with pytest.raises(NotSent, match="1050 jobs are accepted") as many:
        down.enqueue_many({"prompt": "a", "job_id": f"j{i}"} for i in range(1050))
    assert many.value.job_ids == [f"j{i}" for i in range(1050)]
    assert ledger.counts() == {"queued": 1051}
    up = make(settings)
    up.enqueue(prompt="a", job_id="j0")
    assert queue_length(settings) == 1
    fed = Feed(ledger.engine, settings.queue, 2_000).take()
    assert len(fed) == 1050
    assert {m.job_id for m in fed} == {*caught.value.job_ids, *many.value.job_ids} - {"j0"}


def test_only_jobs_that_have_no_message_are_counted_as_not_sent(
    make: Any, ledger: Ledger, settings: Settings
) -> None:
    up, down = make(settings), make(settings.model_copy(update={"broker_url": DOWN}))
    sent, ended = up.enqueue_many([{"prompt": "a", "idempotency_key": k} for k in "se"])
    up.cancel(ended)
    keys = "s", "e", "new", "new"
    with pytest.raises(NotSent) as caught:
        down.enqueue_many([{"prompt": "a", "idempotency_key": k} for k in keys])
    *known, new, again = caught.value.job_ids
    assert (known, again) == ([sent, ended], new)
    assert str(caught.value).startswith(f"job {new!r} is accepted, but not in the queue yet")
    assert caught.value.unsent == [new]
    assert down.enqueue_many([{"prompt": "a", "idempotency_key": "s"}]) == [sent]


def test_an_embedded_broker_that_cannot_start_is_a_broker_that_is_down(
    producer: Any, ledger: Ledger, settings: Settings
) -> None:
    (settings.home / "valkey").mkdir()
    (settings.home / "valkey" / "appendonlydir").write_text("in the way")
    with pytest.raises(NotSent, match="embedded Valkey did not start"):
        producer.enqueue(prompt="a")
    assert ledger.counts() == {"queued": 1}


def test_the_embedded_broker_may_be_restarted_under_a_producer(
    producer: Any, settings: Settings
) -> None:
    producer.enqueue(prompt="a")
    stop_valkey(settings.home)
    ensure_valkey(settings.home)
    producer.close()
    producer.enqueue(prompt="b")
    assert queue_length(settings) == 2


def test_threads_may_share_a_producer(settings: Settings) -> None:
    found: list[str] = []
    with Producer(settings) as producer:

        def work(thread: int) -> None:
            keys = [f"{thread % 2}-{i}" for i in range(10)]
            found.extend(producer.enqueue(prompt="a", idempotency_key=key) for key in keys)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(found), len(set(found))) == (40, 20)
        assert producer.ledger.counts() == {"queued": 20}
