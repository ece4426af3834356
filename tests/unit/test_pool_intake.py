"""Intake, leases and what is postponed around a real ledger and the fake runner."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

from lorabatch import Job, Ledger, Result, Settings
from lorabatch.feed import Feed
from lorabatch.ledger import Start
from lorabatch.tables import jobs
from lorabatch_worker.delivery import Delivery
from lorabatch_worker.intake import Intake, IntakeParts
from lorabatch_worker.leases import Leases
from lorabatch_worker.live import LiveJobs
from lorabatch_worker.postponed import AGAIN_S, ON_ITS_WAY, Postponed
from lorabatch_worker.publisher import Publisher
from lorabatch_worker.pulse import Pulse
from lorabatch_worker.recorder import Recorder
from tests.fake_runner import FakeRunner

POINTER = {"schema_version": 1, "tenant": "default", "adapter_id": None}
LONG = {"max_new_tokens": 100_000}


def wait_until(ready: Callable[[], object]) -> None:
    end_s = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < end_s, "not within 20 s"
        time.sleep(0.005)


class Bench:
    """All of a worker but Celery."""

    def __init__(self, settings: Settings, ledger: Ledger, runner: FakeRunner) -> None:
        self.settings, self.ledger, self.runner = settings, ledger, runner
        self.ended: dict[str, Result] = {}
        self.live = LiveJobs()
        backend = SimpleNamespace(
            mark_as_done=lambda *_: None,
            mark_as_failure=lambda *_: None,
            mark_as_revoked=lambda *_: None,
        )
        conf = SimpleNamespace(result_expires=60)
        app: Any = SimpleNamespace(backend=backend, conf=conf)
        self.publisher = Publisher(app, lambda call: call())
        self.postponed = Postponed(ledger, self.live, lambda call: call())
        self.recorder = Recorder(ledger, self.live, self.publisher, settings.in_hand)
        self.pulse = Pulse(runner, settings.lease_s)
        self.leases = Leases(settings, ledger, self.live, runner, self.pulse)
        self.intake = Intake(
            IntakeParts(
                settings=settings,
                owner="me",
                ledger=ledger,
                live=self.live,
                runner=runner,
                pulse=self.pulse,
                recorder=self.recorder,
                publisher=self.publisher,
                give_back=self.postponed.give_back,
            )
        )

    def start(self) -> None:
        self.runner.start(self._started, self.recorder.put, self.postponed.put)
        for part in (self.publisher, self.recorder, self.leases, self.intake, self.postponed):
            part.start()

    def _started(self, job_ids: Sequence[str]) -> None:
        self.live.started(job_ids)

    def deliver(self, task_id: str, **kwargs: Any) -> None:
        end = self.ended.__setitem__
        self.intake.put(
            Delivery(task_id, lambda result: end(task_id, result), kwargs=kwargs or POINTER)
        )

    def stop(self) -> None:
        self.intake.close()
        self.leases.close()
        self.runner.drain(0)
        self.recorder.abandon()
        self.postponed.close()
        self.publisher.close()
        parts = (self.intake, self.leases, self.recorder, self.postponed)
        wait_until(lambda: not any(part.running for part in parts))


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner(slots=4, step_s=0.001)


@pytest.fixture
def bench(settings: Settings, ledger: Ledger, runner: FakeRunner) -> Iterator[Bench]:
    fast = settings.model_copy(update={"lease_s": 1.0, "max_attempts": 3})
    bench = Bench(fast, ledger, runner)
    yield bench
    if bench.intake.running:
        bench.stop()


def test_one_bad_message_does_not_stop_its_group(bench: Bench) -> None:
    bench.deliver("good", prompt="x")
    bench.deliver("bad", prompt="x", sampling_params={"top_k": -1})
    bench.deliver("fine", prompt="y")
    bench.start()
    wait_until(lambda: len(bench.ended) == 3)
    states = {task_id: result.state for task_id, result in bench.ended.items()}
    assert states == {"good": "succeeded", "bad": "failed", "fine": "succeeded"}
    assert bench.ledger.counts() == {"succeeded": 2, "failed": 1}


def test_a_conflict_does_not_stop_its_group(bench: Bench) -> None:
    bench.ledger.accept([Job(job_id="first", prompt="x", idempotency_key="k")])
    bench.deliver("second", prompt="other", idempotency_key="k")
    bench.deliver("third", prompt="z")
    bench.start()
    wait_until(lambda: len(bench.ended) == 2)
    assert bench.ended["second"].error is not None
    assert bench.ended["second"].error.code == "idempotency_conflict"
    assert bench.ended["third"].state == "succeeded"
    assert bench.ledger.counts() == {"queued": 1, "succeeded": 1}


def test_a_job_leased_elsewhere_is_held_and_taken_over_when_the_lease_ran_out(
    bench: Bench,
) -> None:
    bench.ledger.accept([Job(job_id="a", prompt="x")])
    (other,) = bench.ledger.claim(["a"], "other", 600).values()
    bench.ledger.mark_started([Start(other)])
    bench.start()
    bench.deliver("a")
    wait_until(lambda: bench.live.counts() == {"live": 0, "held": 1})
    assert bench.ended == {}
    bench.ledger.renew([other], -1)
    wait_until(lambda: "a" in bench.ended)
    assert bench.ended["a"].attempt == 2


def test_a_copy_of_a_live_job_waits_for_the_same_outcome(bench: Bench) -> None:
    bench.start()
    bench.deliver("a", prompt="x", sampling_params=LONG)
    wait_until(lambda: bench.runner.load["running"] == 1)
    both: list[Result] = []
    bench.intake.put(Delivery("a", both.append, kwargs=POINTER))
    bench.intake.put(Delivery("a", both.append, kwargs=POINTER))
    wait_until(lambda: sum(len(c) for c in _waiting(bench)) == 3)
    bench.runner.abort("a", "cancelled")
    wait_until(lambda: len(both) == 2 and "a" in bench.ended)
    assert {result.state for result in both} == {"cancelled"}
    assert bench.ended["a"].attempt == 1


def _waiting(bench: Bench) -> list[list[Delivery]]:
    return [job.deliveries for job in bench.live._live.values()]


def test_too_many_attempts_end_a_job(bench: Bench) -> None:
    bench.ledger.accept([Job(job_id="poison", prompt="x")])
    for _ in range(3):
        claims = bench.ledger.claim(["poison"], "crashing", -1).values()
        bench.ledger.mark_started([Start(claim) for claim in claims])
    bench.start()
    bench.deliver("poison")
    wait_until(lambda: "poison" in bench.ended)
    error = bench.ledger.results(["poison"])["poison"].error
    assert error is not None
    assert error.code == "attempts_exhausted"
    assert "3 times" in error.message


def test_a_row_of_a_newer_version_goes_back_to_the_broker(bench: Bench) -> None:
    bench.ledger.accept([Job(job_id="new", prompt="x"), Job(job_id="old", prompt="x")])
    with bench.ledger.engine.begin() as connection:
        body = {"schema_version": 2, "prompt": "x"}
        connection.execute(sa.update(jobs).where(jobs.c.job_id == "new").values(body=body))
    given_back: list[float] = []
    bench.deliver("new")
    newer = Delivery(
        "new", lambda _: None, on_postponed=lambda s, why: given_back.append(s), kwargs=POINTER
    )
    bench.intake.put(newer)
    bench.deliver("old")
    bench.start()
    wait_until(lambda: "old" in bench.ended and given_back)
    wait_until(lambda: bench.live.counts() == {"live": 0, "held": 1})
    assert given_back == [bench.settings.visibility_timeout_s]
    assert "new" not in bench.ended
    assert bench.ledger.states(["new"]) == {"new": "queued"}


def test_an_outage_at_claim_is_waited_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    claim, tries = bench.ledger.claim, []

    def failing(*args: Any) -> Any:
        tries.append(len(bench.ended))
        if len(tries) <= 2:
            raise sa.exc.OperationalError("UPDATE", {}, Exception("server closed"))
        return claim(*args)

    monkeypatch.setattr(bench.ledger, "claim", failing)
    bench.start()
    bench.deliver("a", prompt="x")
    wait_until(lambda: "a" in bench.ended)
    assert tries == [0, 0, 0]


def test_a_hung_engine_claims_nothing_and_lets_its_leases_run_out(bench: Bench) -> None:
    bench.pulse.limit_s = 0.5
    bench.start()
    bench.deliver("a", prompt="x", sampling_params=LONG)
    wait_until(lambda: bench.runner.load["running"] == 1)
    bench.runner.hangs = True
    wait_until(lambda: not bench.pulse.beating)
    bench.deliver("b", prompt="y")
    wait_until(lambda: bench.ledger.claim(["a"], "other", 600))
    assert bench.ledger.states(["a", "b"]) == {"a": "running"}
    bench.runner.hangs = False
    wait_until(lambda: "b" in bench.ended)
    wait_until(lambda: bench.live.counts() == {"live": 0, "held": 1})
    idle = {"waiting": 0, "running": 0}
    wait_until(lambda: idle.items() <= bench.runner.load.items())
    assert "a" not in bench.ended


def test_leases_are_renewed_and_cancellations_seen(bench: Bench) -> None:
    bench.start()
    bench.deliver("a", prompt="x", sampling_params=LONG)
    wait_until(lambda: bench.runner.load["running"] == 1)
    first = _expiry(bench)
    wait_until(lambda: _expiry(bench) > first)
    bench.ledger.cancel(["a"])
    wait_until(lambda: "a" in bench.ended)
    assert bench.ended["a"].state == "cancelled"


def _expiry(bench: Bench) -> int:
    with bench.ledger.engine.connect() as connection:
        return connection.scalar(sa.select(jobs.c.lease_expires_us)) or 0


def test_what_is_postponed_goes_back_to_the_ledger_and_the_broker(bench: Bench) -> None:
    bench.runner.slots = 0  # all wait
    bench.start()
    given_back: list[tuple[str, float, str]] = []
    for name in ("one", "two", "stays"):
        delivery = Delivery(name, lambda _: None, kwargs={"prompt": "x"})
        if name != "stays":
            delivery.on_postponed = lambda *back, name=name: given_back.append((name, *back))  # type: ignore[misc]
        bench.intake.put(delivery)
    wait_until(lambda: bench.runner.load["waiting"] == 3)
    bench.ledger.cancel(["two"])
    bench.runner.postpone()
    wait_until(lambda: bench.live.counts() == {"live": 0, "held": 1})
    assert given_back == [(name, AGAIN_S, ON_ITS_WAY) for name in ("one", "two")]
    assert bench.ledger.states(["one", "two", "stays"]) == {
        "one": "queued",
        "two": "cancelled",
        "stays": "queued",
    }
    feed = Feed(bench.ledger.engine, "lorabatch")
    assert feed.nowhere(-AGAIN_S / 2) == [], "not before their messages have come again"
    assert len(feed.nowhere(-2 * AGAIN_S)) == 2
    assert bench.postponed.count == 3


def test_what_cannot_be_handed_back_is_left_to_its_lease(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError

    monkeypatch.setattr(bench.ledger, "release", refuse)
    bench.runner.slots = 0
    bench.start()
    bench.deliver("one", prompt="x")
    wait_until(lambda: bench.runner.load["waiting"] == 1)
    bench.runner.postpone()
    wait_until(lambda: bench.live.counts() == {"live": 0, "held": 1})
