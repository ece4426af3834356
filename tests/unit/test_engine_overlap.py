"""Outcomes that are made while the next step runs: all of them, the same, none lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorabatch_worker.engine import Engine
from tests.desk import WAIT_S, Desk, job, leave_nothing, long
from tests.models import claim


def kinds(engine: Engine) -> Iterator[str]:
    """The engine as it is on a CPU, then as on a GPU."""
    yield "once-"
    engine.overlaps = True
    yield "later-"


@pytest.mark.parametrize("overlaps", [False, True])
def test_what_ended_is_reported_at_once_or_while_the_next_step_runs(
    overlaps: bool, own: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = own.engine
    engine.overlaps = overlaps
    events: list[str] = []
    forward, launch = engine.runner.forward, engine._launch

    class Waited:
        def __init__(self, draw: Any) -> None:
            self.draw, self.scores = draw, draw.scores

        def wait(self) -> list[int]:
            events.append("wait")
            tokens: list[int] = self.draw.wait()
            return tokens

    def launched(chunks: Any) -> Any:
        arrivals = engine.arrivals
        with arrivals._changed:  # neither may end before the other is there
            assert arrivals._changed.wait_for(lambda: not arrivals.preparing, WAIT_S)
        events.append("launch")
        return forward(chunks)

    def report(outcomes: Any) -> None:
        events.extend(o.claim.job.job_id for o in outcomes)
        own._on_finished(outcomes)

    monkeypatch.setattr(engine.runner, "forward", launched)
    monkeypatch.setattr(engine, "_launch", lambda portion: Waited(launch(portion)))
    monkeypatch.setattr(engine, "_on_finished", report)
    own.run(job("short", max_new_tokens=2), job("long", max_new_tokens=6))
    assert events[events.index("short") - 1] == ("launch" if overlaps else "wait")
    assert events[-2:] == ["wait", "long"], "at once where no step comes after it"
    leave_nothing(engine)


def test_an_engine_that_reports_later_reports_all_and_the_same(
    own: Desk, tiny_adapters: dict[str, Path]
) -> None:
    names = [*tiny_adapters, None]
    wanted, found = (
        own.run(*(job(f"{kind}{i}", adapter=name) for i, name in enumerate(names)))
        for kind in kinds(own.engine)
    )
    for i in range(len(names)):
        assert found[f"later-{i}"].token_ids == wanted[f"once-{i}"].token_ids
    leave_nothing(own.engine)
    own.submit(job("ends", max_new_tokens=2), long("runs"))
    own.wait(["ends"])
    assert [c.job.job_id for c in own.engine.drain(0)] == ["runs"]
    assert sorted(own.reported()) == sorted([*wanted, *found, "ends"])


def test_a_step_that_fails_while_outcomes_wait_loses_none(
    own: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.engine.overlaps = True
    forward, calls = own.engine.runner.forward, [0]

    def broken(chunks: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise RuntimeError("no")
        return forward(chunks)

    monkeypatch.setattr(own.engine.runner, "forward", broken)
    results = own.run(job("short", max_new_tokens=2), job("other"))
    assert (results["short"].state, results["other"].state) == ("succeeded", "failed")
    leave_nothing(own.engine)


@pytest.mark.parametrize("crashes", [(2, 2), (0, 2), (2, 0)])
def test_what_ended_is_reported_before_a_suspect_begins_and_after_it(
    own: Desk, crashes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would die, and be blamed, with what comes next."""
    monkeypatch.setattr(own.engine.scheduler, "max_seqs", 1)
    own.engine.overlaps = True
    events: list[str] = []
    started, finished = own.engine._on_started, own.engine._on_finished
    own.engine._on_started = lambda ids: (events.extend(f"began {i}" for i in ids), started(ids))[1]
    own.engine._on_finished = lambda outcomes: (
        events.extend(f"ended {o.claim.job.job_id}" for o in outcomes),
        finished(outcomes),
    )[1]
    both = zip(("one", "two"), crashes, strict=True)
    own.engine.submit([replace(claim(job(name)), crashes=crashed) for name, crashed in both])
    own.wait(["one", "two"])
    assert events == ["began one", "ended one", "began two", "ended two"]


def test_a_suspect_has_begun_before_its_adapter_is_put_on_the_device(
    own: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or what dies of the adapter would be tried for ever."""
    seen: list[tuple[str, bool]] = []
    acquire = own.engine.scheduler.slots.acquire

    def noting(one: Any) -> bool:
        seen.append((one.job_id, one.job_id in own.started))
        return acquire(one)

    monkeypatch.setattr(own.engine.scheduler.slots, "acquire", noting)
    suspect = replace(claim(job("suspect", adapter="all")), losses=4)
    own.engine.submit([suspect])
    own.wait(["suspect"])
    own.run(job("other", adapter="dora"))
    assert seen == [("suspect", True), ("other", False)]
    assert own.started == ["suspect", "other"]
