"""Waiting for jobs by the client: results, failures, cancelled jobs, time-outs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lorabatch import Job, Ledger, Settings
from lorabatch.errors import JobCancelled, JobFailed, JobNotFound, WaitTimeout
from lorabatch_producer import AsyncProducer
from lorabatch_producer.waiting import Watch
from tests.played_worker import by_adapter, fails, run_queued, working


def test_who_waits_is_told_how_it_failed(producer: Any, ledger: Ledger) -> None:
    job_id = producer.enqueue(prompt="a", adapter_id="nope")
    run_queued(ledger, fails)
    with pytest.raises(JobFailed, match=f"{job_id}.*unknown_adapter: no adapter of that id"):
        producer.wait(job_id)
    assert producer.result(job_id).state == "failed"


def test_many_are_yielded_failed_ones_too(producer: Any, ledger: Ledger) -> None:
    ids = producer.enqueue_many(
        [{"prompt": "a", "adapter_id": adapter} for adapter in ("sql", "broken")]
    )
    with working(ledger, by_adapter):
        states = {result.job_id: result.state for result in producer.wait(ids)}
    assert states == dict(zip(ids, ("succeeded", "failed"), strict=True))


def test_cancelled_jobs(producer: Any, ledger: Ledger) -> None:
    queued, running = producer.enqueue(prompt="a"), producer.enqueue(prompt="b")
    ledger.claim([running], "me", 60)
    assert producer.cancel([queued, running]) == {queued: "cancelled", running: "running"}
    with pytest.raises(JobCancelled, match=queued):
        producer.wait(queued)
    one = producer.enqueue(prompt="c")
    assert producer.cancel(one) == {one: "cancelled"}
    with pytest.raises(JobNotFound, match="'nobody'"):
        producer.cancel("nobody")


def test_waiting_ends_when_time_is_up(producer: Any, ledger: Ledger) -> None:
    first, second = producer.enqueue(prompt="a"), producer.enqueue(prompt="b")
    with pytest.raises(WaitTimeout, match=rf"job '{first}' is queued after 0\.05 s"):
        producer.wait(first, timeout_s=0.05)
    ledger.claim([first], "me", 60)
    with pytest.raises(WaitTimeout, match=rf"2 jobs are open, the first '{first}' \(running\)"):
        list(producer.wait([first, second], timeout_s=0))
    run_queued(ledger)
    results = iter(producer.wait([first, second], timeout_s=0))
    assert next(results).job_id == second
    with pytest.raises(WaitTimeout, match=first):
        next(results)


def test_unknown_ids(producer: Any) -> None:
    for ask in (
        lambda: producer.result("nobody"),
        lambda: producer.wait("nobody"),
        lambda: list(producer.wait(["nobody"])),
        lambda: producer.status("nobody"),
    ):
        with pytest.raises(JobNotFound, match="'nobody'"):
            ask()


def test_both_databases(make: Any, database: Any, home: Any) -> None:
    url = database.url.render_as_string(hide_password=False)
    producer = make(Settings.load(home=home, database_url=url))
    asked = [{"prompt": f"naïve 🦜 {i}", "adapter_id": "sql"} for i in range(50)]
    ids = producer.enqueue_many(asked)
    with working(Ledger(database)):
        texts = {result.job_id: result.text for result in producer.wait(ids)}
    assert [texts[job_id] for job_id in ids] == [f"sql: naïve 🦜 {i}" for i in range(50)]


async def test_waits_do_not_hold_threads(settings: Settings, ledger: Ledger) -> None:
    async with AsyncProducer(settings) as producer:
        ids = await producer.enqueue_many({"prompt": "a"} for _ in range(50))
        waits = asyncio.gather(*(producer.wait(job_id) for job_id in ids))
        with working(ledger):
            results = await waits
    assert [result.job_id for result in results] == ids


def test_looking_takes_a_small_part_of_the_time(ledger: Ledger) -> None:
    job_id = "slow-to-look-at"
    ledger.accept([Job(job_id=job_id, prompt="a")])
    watch = Watch(ledger, [job_id], None)
    watch.look()
    watch._took_s = 0.005
    assert watch.pause_s() == pytest.approx(0.5)
    watch._took_s = 0.3
    assert watch.pause_s() == 1.0
    watch._took_s = 3.0
    assert watch.pause_s() == 3.0
    watch._took_s = 1e-6
    assert watch.pause_s() < 0.1
