"""Who is blamed when a worker ends because of its device, however it comes to end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lorabatch import Job, Settings
from lorabatch.queue import make_app
from lorabatch_worker.delivery import Delivery
from lorabatch_worker.pulse import Pulse
from lorabatch_worker.service import DRAIN, Service
from tests.fake_runner import FakeRunner

POINTER: dict[str, Any] = {"schema_version": 1, "tenant": "default", "adapter_id": None}
LONG = {"max_new_tokens": 10**5}


def wait_until(ready: Callable[[], object]) -> None:
    end_s = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < end_s, "not within 20 s"
        time.sleep(0.005)


def pump(busy: Callable[[], bool], limit_s: float, hurry: bool = False) -> None:
    end_s = time.monotonic() + limit_s
    while busy() and time.monotonic() < end_s:
        time.sleep(0.005)


class Worker:
    def __init__(self, settings: Settings) -> None:
        self.runner = FakeRunner(slots=1, step_s=0.001)
        self.gave_up = threading.Event()
        self.service = Service(
            make_app(settings),
            settings,
            lambda _: self.runner,
            lambda call: call(),
            self.gave_up.set,
        )
        self.service.start()

    def deliver(self, *names: str) -> None:
        jobs = [Job(job_id=name, prompt="x", sampling_params=LONG) for name in names]
        self.service.ledger.accept(jobs, as_sent=True)
        for name in names:
            self.service.take(Delivery(name, lambda _: None, kwargs=POINTER, publish=False))
        wait_until(lambda: len(self.service.live.claims()) == len(names))
        wait_until(lambda: self.runner.load["running"] == 1)

    def crashes(self, settings: Settings) -> dict[str, int]:
        """As the next worker sees them."""
        ledger = Service(
            make_app(settings),
            settings,
            lambda _: FakeRunner(),
            lambda call: call(),
            lambda: None,
        ).ledger
        claims = ledger.claim(["first", "second"], "next", 9.0)
        return {name: claim.crashes for name, claim in claims.items()}


@pytest.fixture
def worker(settings: Settings, valkey_url: str) -> Iterator[Worker]:
    made = Worker(settings)
    yield made
    made.runner.hangs = False
    if made.service.recorder.running:
        made.service.stop(0.0, pump)


def test_what_breaks_the_device_before_it_begins_is_counted_too(
    worker: Worker, settings: Settings
) -> None:
    """As an adapter does that cannot be put there: the engine has not begun its jobs."""
    worker.deliver("first", "second")
    worker.service._broken(["second"])
    assert worker.gave_up.is_set()
    worker.service.stop(0.0, pump)
    assert worker.crashes(settings) == {"first": 0, "second": 1}


def test_what_runs_on_a_hung_device_is_counted_when_somebody_else_stops_the_worker(
    worker: Worker, settings: Settings
) -> None:
    worker.deliver("first", "second")
    worker.service.pulse.limit_s = 0.05
    worker.runner.hangs = True
    wait_until(lambda: not worker.service.pulse.beating)
    worker.service.stop(0.0, pump)
    assert worker.crashes(settings) == {"first": 1, "second": 0}
    assert DRAIN in [thread.name for thread in threading.enumerate()], "main ends the process then"


def test_a_runner_that_waits_for_the_ledger_does_not_hang() -> None:
    runner = FakeRunner()
    pulse = Pulse(runner, 1.0)
    runner.last_progress_s -= 1000
    assert not pulse.beating
    with pulse.excused():
        assert pulse.beating
    assert pulse.beating, "and has its time again"
    pulse._excused_until_s -= 1000
    assert not pulse.beating
