"""Jobs aborted, dropped and drained: every other one is reported exactly once."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lorabatch.errors import AdapterUnavailable
from lorabatch_worker.adapters import store as store_module
from tests.desk import PROMPTS, WAIT_S, Desk, job, leave_nothing, long, start


def test_aborting_a_running_job_keeps_what_it_made(own: Desk) -> None:
    own.submit(long("gone"), long("failed"), job("stays", max_new_tokens=30))
    own.wait_started("gone")
    own.wait_started("failed")
    own.engine.abort("gone", "cancelled")
    own.engine.abort("failed", "lease_lost")
    results = own.wait(["gone", "failed", "stays"])
    assert (results["gone"].state, results["failed"].state) == ("cancelled", "failed")
    assert results["gone"].error is not None
    assert results["failed"].error is not None
    assert (results["gone"].error.code, results["failed"].error.code) == (
        "job_cancelled",
        "lease_lost",
    )
    assert results["gone"].text is None
    assert results["gone"].usage.output_tokens == len(results["gone"].token_ids) < 240
    assert results["stays"].state == "succeeded"
    leave_nothing(own.engine)


def test_aborting_a_waiting_job(tiny_folder: Path, home: Path) -> None:
    desk = start(tiny_folder, home, max_seqs=1)
    desk.submit(long("first"))
    desk.wait_started("first")
    desk.submit(job("second"), job("third"))
    while len(desk.engine.arrivals):  # until the scheduler has them
        time.sleep(0.01)
    desk.engine.abort("second", "cancelled")
    second = desk.wait(["second"])["second"]
    assert (second.state, second.usage.total_tokens) == ("cancelled", 0), "nothing was computed"
    desk.engine.abort("first", "cancelled")
    assert desk.wait(["first"])["first"].usage.prompt_tokens > 0
    assert desk.wait(["third"])["third"].state == "succeeded"
    assert "second" not in desk.started
    assert desk.engine.drain(0) == []


def test_aborting_a_job_whose_adapter_is_still_loading(
    own: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = _hold_loads(monkeypatch)
    own.submit(job("a", adapter="all"), job("b", adapter="all"), job("c", adapter="all"))
    own.engine.abort("a", "cancelled")
    own.engine.drop(["b"])
    assert own.wait(["a"])["a"].state == "cancelled"
    assert own.engine.load["waiting"] == 1
    release.set()
    assert own.wait(["c"])["c"].state == "succeeded"
    assert own.reported() == ["a", "c"]


def _hold_loads(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> threading.Event:
    """Adapter loads begin, but end (or raise) only once the event is set."""
    release = threading.Event()
    read = store_module.read_adapter

    def held(*args: Any) -> Any:
        assert release.wait(WAIT_S)
        if error is not None:
            raise error
        return read(*args)

    monkeypatch.setattr(store_module, "read_adapter", held)
    return release


def test_a_dropped_job_is_never_reported_and_may_come_again(own: Desk) -> None:
    own.submit(long("j"), long("k"))
    own.wait_started("j")
    own.engine.drop(["j", "k", "never seen"])
    own.submit(job("j", max_new_tokens=3))
    result = own.wait(["j"])["j"]
    assert len(result.token_ids) == 3
    own.run(job("last"))
    assert own.reported() == ["j", "last"]
    leave_nothing(own.engine)


def test_aborting_an_unknown_job_changes_nothing(own: Desk) -> None:
    own.engine.abort("later", "cancelled")
    own.run(job("before"))
    assert own.run(job("later"))["later"].state == "succeeded"


def test_drain_returns_exactly_what_did_not_end(
    tiny_folder: Path, configured: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = start(tiny_folder, home, configured, max_seqs=2)
    release = _hold_loads(monkeypatch, AdapterUnavailable("too late"))
    desk.submit(job("ends", max_new_tokens=2), long("runs"))
    desk.wait(["ends"])
    desk.submit(long("runs-too"), long("waits"), job("loads", adapter="all"))
    desk.wait_started("runs-too")
    left = desk.engine.drain(0)
    assert sorted(c.job.job_id for c in left) == ["loads", "runs", "runs-too", "waits"]
    assert desk.reported() == ["ends"]
    release.set()
    desk.engine.store._pool.shutdown(wait=True)
    desk.engine.abort("loads", "cancelled")
    assert desk.reported() == ["ends"]


def test_drain_lets_running_jobs_end_and_admits_none(tiny_folder: Path, home: Path) -> None:
    desk = start(tiny_folder, home, max_seqs=1)
    desk.submit(job("runs", max_new_tokens=40))
    desk.wait_started("runs")
    desk.submit(job("waits"))
    left = desk.engine.drain(WAIT_S)
    assert [c.job.job_id for c in left] == ["waits"]
    assert desk.reported() == ["runs"]
    assert not desk.engine._thread.is_alive()


def test_every_job_is_reported_once_under_random_submits_aborts_and_drops(
    tiny_folder: Path, configured: str, home: Path
) -> None:
    desk = start(tiny_folder, home, configured, max_seqs=6, max_step_tokens=32, adapter_slots=2)
    names = [None, "all", "rslora", "attention", "nobody"]
    dropped: set[str] = set()

    def client(number: int) -> None:
        rng = random.Random(number)
        for i in range(25):
            group = [
                job(
                    f"{number}-{i}-{k}",
                    rng.choice(PROMPTS),
                    rng.choice(names),
                    max_new_tokens=rng.randrange(1, 12),
                )
                for k in range(rng.randrange(1, 4))
            ]
            desk.submit(*group)
            if rng.random() < 0.3:
                desk.engine.abort(rng.choice(group).job_id, "cancelled")
            if rng.random() < 0.2:
                victim = rng.choice(group).job_id
                dropped.add(victim)
                desk.engine.drop([victim])
            submitted.extend(j.job_id for j in group)
            time.sleep(rng.random() * 0.01)

    submitted: list[str] = []
    threads = [threading.Thread(target=client, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    desk.wait(set(submitted) - dropped)
    left = [c.job.job_id for c in desk.engine.drain(WAIT_S)]
    reported = desk.reported()
    assert len(reported) == len(set(reported))
    assert not set(reported) & set(left)
    assert set(submitted) - set(reported) - set(left) <= dropped
    leave_nothing(desk.engine)
