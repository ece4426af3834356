"""The recorder: commit first, then publish, then end; outages wait, bad outcomes go alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

from lorabatch import Job, Ledger, Result, Usage
from lorabatch.ledger import Claim, Outcome, Start
from lorabatch.tables import jobs
from lorabatch_worker import grouping, recorder
from lorabatch_worker.delivery import Delivery
from lorabatch_worker.live import LiveJobs
from lorabatch_worker.publisher import Publisher
from lorabatch_worker.recorder import Recorder
from lorabatch_worker.service import Service


def outcome(claim: Claim) -> Outcome:
    job = claim.job
    result = Result(
        job_id=job.job_id,
        tenant=job.tenant,
        adapter_id=job.adapter_id,
        state="succeeded",
        text="done",
        token_ids=(1, 2),
        usage=Usage(prompt_tokens=1, output_tokens=2),
        attempt=claim.attempt,
    )
    return Outcome(claim, result)


def wait_until(ready: Callable[[], object]) -> None:
    end_s = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < end_s, "not within 20 s"
        time.sleep(0.005)


class Backend:
    """A result backend that notes what is published, or is down."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.down = False

    def mark_as_done(self, task_id: str, result: Any) -> None:
        if self.down:
            raise ConnectionError("down")
        assert result["finished_us"] is not None
        self.log.append(f"publish {task_id}")

    def mark_as_failure(self, task_id: str, error: Exception) -> None:
        self.log.append(f"publish {task_id}: {error}")


class Bench:
    """A recorder and its neighbours, with a log of what happened in which order."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.log: list[str] = []
        self.live = LiveJobs()
        self.backend = Backend(self.log)
        app: Any = SimpleNamespace(backend=self.backend, conf=SimpleNamespace(result_expires=60))
        self.publisher = Publisher(app, lambda call: call())
        self.recorder = Recorder(ledger, self.live, self.publisher, in_hand=128)
        self.publisher.start()
        self.recorder.start()

    def claim(self, *job_ids: str, lease_s: float = 30) -> list[Claim]:
        self.ledger.accept([Job(job_id=job_id, prompt="x") for job_id in job_ids])
        claims = self.ledger.claim(job_ids, "me", lease_s)
        for job_id, claim in claims.items():
            self.live.add(claim, [Delivery(job_id, self._end(job_id), job_id=job_id)])
        return [claims[job_id] for job_id in job_ids]

    def _end(self, job_id: str) -> Callable[[Result], None]:
        return lambda result: self.log.append(f"end {job_id} {result.state}")

    def ends(self) -> int:
        return sum(line.startswith("end") for line in self.log)


@pytest.fixture
def bench(ledger: Ledger) -> Iterator[Bench]:
    bench = Bench(ledger)
    yield bench
    bench.recorder.abandon()
    bench.publisher.close()
    wait_until(lambda: not bench.recorder.running)  # its connection is back in the pool


def test_the_order_is_commit_publish_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    (claim,) = bench.claim("a")
    record = bench.ledger.record

    def noting(outcomes: Sequence[Outcome], starts: Sequence[Start]) -> set[str]:
        written = record(outcomes, starts)
        bench.log.append("commit")
        return written

    monkeypatch.setattr(bench.ledger, "record", noting)
    bench.recorder.put([outcome(claim)])
    wait_until(bench.ends)
    assert bench.log == ["commit", "publish a", "end a succeeded"]
    assert bench.live.counts() == {"live": 0, "held": 0}


def test_a_start_is_counted_without_waiting_for_an_outcome(bench: Bench) -> None:
    (claim,) = bench.claim("a", lease_s=-1)
    bench.recorder.started([claim])

    def counted() -> bool:
        with bench.ledger.engine.connect() as connection:
            return connection.scalar(sa.select(jobs.c.attempts)) == 1

    wait_until(counted)
    assert bench.ledger.claim(["a"], "next", 30)["a"].attempt == 2


def test_groups_that_follow_one_another_are_large(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouping, "WAIT_S", 0.0)
    monkeypatch.setattr(grouping, "EVERY_S", 3600.0)
    monkeypatch.setattr(grouping, "RATE", 1e-6)
    monkeypatch.setattr(recorder, "GROUP_MAX", 2)
    first, second, third = (outcome(claim) for claim in bench.claim("a", "b", "c"))
    record, sizes = bench.ledger.record, []

    def noting(outcomes: Sequence[Outcome], starts: Sequence[Start]) -> set[str]:
        sizes.append(len(outcomes))
        return record(outcomes, starts)

    monkeypatch.setattr(bench.ledger, "record", noting)
    bench.recorder.put([first])
    wait_until(bench.ends)  # alone, it does not wait for more
    bench.recorder.put([second])
    wait_until(bench.recorder._queue.empty)  # the recorder has it, and waits for the third
    bench.recorder.put([third])
    wait_until(lambda: bench.ends() == 3)
    assert sizes == [1, 2]


def test_a_worker_with_few_jobs_gathers_for_less_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping.time, "monotonic", lambda: 100.0)
    for in_hand, gather_s in ((1000, grouping.EVERY_S), (4, 4 / grouping.RATE)):
        groups = grouping.Grouping(in_hand)
        groups.begin()
        assert groups.left_s() == pytest.approx(grouping.WAIT_S)
        groups.end()
        groups.begin()
        assert groups.left_s() == pytest.approx(gather_s)


def test_an_outage_is_waited_out_and_ends_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    (claim,) = bench.claim("a")
    record, tries = bench.ledger.record, []

    def failing(outcomes: Sequence[Outcome], starts: Sequence[Start]) -> set[str]:
        tries.append(list(bench.log))
        if len(tries) <= 3:
            raise sa.exc.OperationalError("INSERT", {}, Exception("server closed"))
        return record(outcomes, starts)

    monkeypatch.setattr(bench.ledger, "record", failing)
    bench.recorder.put([outcome(claim)])
    wait_until(bench.ends)
    assert tries == [[], [], [], []]
    assert bench.ledger.counts() == {"succeeded": 1}


def test_one_bad_outcome_does_not_take_its_group_along(bench: Bench) -> None:
    good, bad, other = bench.claim("good", "bad", "other")
    broken = outcome(bad)
    broken = Outcome(bad, broken.result.model_copy(update={"seed": 2**70}))
    bench.recorder.started([good, bad, other])
    bench.recorder.put([outcome(good), broken, outcome(other)])
    wait_until(lambda: bench.ends() == 3)
    assert bench.ledger.counts() == {"succeeded": 2, "failed": 1}
    with bench.ledger.engine.connect() as connection:
        assert connection.scalars(sa.select(jobs.c.attempts)).all() == [1, 1, 1]
    result = bench.ledger.results(["bad"])["bad"]
    assert result.error is not None
    assert result.error.code == "engine_fault"
    assert (result.text, result.token_ids, result.usage) == (None, (), Usage())


def test_an_outcome_whose_lease_was_lost_is_held_not_ended(bench: Bench) -> None:
    (stale,) = bench.claim("a", lease_s=-1)
    assert bench.ledger.claim(["a"], "other", 30)
    bench.recorder.put([outcome(stale)])
    wait_until(lambda: bench.live.counts() == {"live": 0, "held": 1})
    assert bench.log == []
    assert bench.ledger.counts() == {"running": 1}
    assert [d.task_id for d in bench.live.due()] == ["a"]


def test_what_ran_alone_is_recorded_before_anything_else_begins(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would be blamed if the next one stops the process."""
    bench.claim("alone", "next")
    alone = replace(bench.live.claims()[0], crashes=2)
    bench.live.add(alone, [])
    asked, record = threading.Event(), bench.ledger.record
    for_certain = bench.recorder.started_for_certain

    def late(*args: Any) -> set[str]:
        asked.wait(20)
        return record(*args)

    def waited_for(claims: Sequence[Claim]) -> None:
        asked.set()
        for_certain(claims)

    monkeypatch.setattr(bench.ledger, "record", late)
    monkeypatch.setattr(bench.recorder, "started_for_certain", waited_for)
    bench.recorder.put([outcome(alone)])
    parts = {"live": bench.live, "recorder": bench.recorder, "_post": lambda call: call()}
    parts["pulse"] = SimpleNamespace(excused=nullcontext)
    service: Any = SimpleNamespace(**parts)
    Service._started(service, ["next"])
    found = bench.ledger.states(["alone"])
    asked.set()
    assert found == {"alone": "succeeded"}


def test_a_backend_that_is_down_does_not_keep_a_recorded_job(bench: Bench) -> None:
    bench.backend.down = True
    bench.recorder.put([outcome(claim) for claim in bench.claim("a", "b")])
    wait_until(lambda: bench.ends() == 2)
    assert bench.ledger.counts() == {"succeeded": 2}


def test_a_wait_for_the_result_is_served_without_any_message(bench: Bench) -> None:
    """After a reconnect the old message is void, but the row still says who waits."""
    bench.ledger.accept([Job(job_id="a", prompt="x")], publish_result=True)
    claim = bench.ledger.claim(["a"], "me", 30)["a"]
    bench.live.add(claim, [])
    bench.recorder.put([outcome(claim)])
    wait_until(lambda: bench.log)
    assert bench.log == ["publish a"]


def test_close_records_what_is_queued(bench: Bench) -> None:
    claims = bench.claim(*(f"j{i}" for i in range(600)))
    bench.recorder.put([outcome(claim) for claim in claims])
    bench.recorder.close()
    wait_until(lambda: not bench.recorder.running)
    assert bench.ledger.counts() == {"succeeded": 600}
