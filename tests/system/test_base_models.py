"""Workers of two base models on one broker and one database: each runs its own queue's jobs."""

from __future__ import annotations

from collections import Counter

import pytest
from shop import Shop, Worker, check_exactly_once, wait_until
from typer.testing import CliRunner

from lorabatch import Job
from lorabatch.errors import IdempotencyConflict
from lorabatch.queue import drained
from lorabatch.tables import job_attempts, jobs
from lorabatch_producer import Producer
from lorabatch_producer.cli import app
from lorabatch_worker.pool import EXIT_NOT_READY
from lorabatch_worker.sweeper import task_id_of

QUEUES = {"lorabatch": "acme/first", "second": "acme/second"}
JOBS = 60


def start(shop: Shop, queue: str, **env: str) -> Worker:
    """With the two settings that README names."""
    return shop.start(LORABATCH_QUEUE=queue, LORABATCH_BASE_MODEL=QUEUES[queue], **env)


def made(count: int, tokens: int = 4, **fields: object) -> list[Job]:
    given = {"tenant": "acme", "sampling_params": {"max_new_tokens": tokens}, **fields}
    return [Job(prompt=f"prompt {n}", adapter_id="sql", **given) for n in range(count)]


def ran_by(shop: Shop, job_ids: list[str]) -> Counter[str]:
    """Attempts at these jobs by the worker's process."""
    rows = shop.rows(job_attempts)
    return Counter(row.worker.split(":")[1] for row in rows if row.job_id in job_ids)


def queues_of(shop: Shop) -> dict[str, str]:
    return {row.job_id: row.queue for row in shop.rows(jobs)}


def test_each_queue_is_run_by_its_own_workers(postgres_shop: Shop) -> None:
    shop = postgres_shop
    workers = {queue: start(shop, queue) for queue in QUEUES}
    for worker in workers.values():
        worker.wait_ready()
    accepted: dict[str, list[Job]] = {queue: made(JOBS) for queue in QUEUES}
    with Producer(shop.settings) as producer:
        for at in range(0, JOBS, 20):
            for queue, some in accepted.items():  # sent by who accepts them, or by a feeder
                producer.enqueue_many(some[at : at + 10], queue=queue)
                shop.ledger.accept(some[at + 10 : at + 20], queue=queue)
        more = made(1)[0]
        accepted["second"].append(more)
        assert producer.enqueue(more, queue="second") == more.job_id
        with pytest.raises(IdempotencyConflict, match="in queue 'second', and this is for 'lorab"):
            producer.enqueue(more)
    shop.wait_ended(2 * JOBS + 1)
    for queue, some in accepted.items():
        ids = [job.job_id for job in some]
        assert ran_by(shop, ids) == {str(workers[queue].process.pid): len(ids)}
        assert {queues_of(shop)[job_id] for job_id in ids} == {queue}
    check_exactly_once(shop, [job for some in accepted.values() for job in some])
    refused = shop.start(LORABATCH_QUEUE="second", LORABATCH_BASE_MODEL="acme/first")
    assert refused.wait() == EXIT_NOT_READY
    assert "queue 'second' is for base model 'acme/second'" in refused.text()


def test_a_queue_without_workers_waits_alone(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = {queue: start(shop, queue) for queue in QUEUES}
    for worker in workers.values():
        worker.wait_ready()
    long = made(8, tokens=20_000)
    with Producer(shop.settings) as producer:
        producer.enqueue_many(long, queue="second")
        wait_until("they run", lambda: shop.ledger.counts().get("running") == 8)
        workers["second"].kill()
        waiting = made(30)
        producer.enqueue_many(waiting, queue="second")
        done = producer.enqueue_many(made(30))
        assert {r.state for r in producer.wait(done, timeout_s=60)} == {"succeeded"}
        # Leases run out, messages become visible again, the sweeper looks: nobody takes them.
        lost = [job.job_id for job in long]
        before = workers["lorabatch"].text().count("jobs sent again")
        sent = {job.job_id for job in [*long, *waiting]}
        wait_until("messages are back", lambda: sent <= queued_ids(shop))
        producer.wait(producer.enqueue_many(made(3)), timeout_s=60)
        assert ran_by(shop, [*sent]) == {str(workers["second"].process.pid): 8}
        assert workers["lorabatch"].text().count("jobs sent again") == before == 0
        producer.cancel(lost)
        for name, value in shop.env.items():
            monkeypatch.setenv(name, value)
        told = CliRunner().invoke(app, ["why", waiting[0].job_id]).stdout
        assert "no worker seems to run: start `lorabatch-worker`, for queue 'second'" in told
        monkeypatch.setenv("LORABATCH_QUEUE", "second")
        told = CliRunner().invoke(app, ["doctor"]).stdout
        assert "(lorabatch+celery: acme/first); none drains 'second'" in told
        start(shop, "second")
        ended = list(producer.wait([job.job_id for job in [*long, *waiting]], timeout_s=60))
    assert Counter(result.state for result in ended) == {"succeeded": 30, "cancelled": 8}


def queued_ids(shop: Shop) -> set[str]:
    raw = [item for name in drained(["second"]) for item in shop.broker.lrange(name, 0, -1)]
    return {task_id_of(item) for item in raw}
