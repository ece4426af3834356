"""What takes long to prepare keeps nobody waiting but its own tenant."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from lorabatch.ledger import Claim
from lorabatch_worker import aside as asides
from lorabatch_worker.arrivals import Arrivals
from lorabatch_worker.aside import Aside
from lorabatch_worker.sequence import Sequence
from tests.desk import WAIT_S
from tests.models import claim
from tests.structured_jobs import wants


class Gate:
    """A call that waits, and those that it keeps waiting."""

    def __init__(self) -> None:
        self.began, self.open, self.over = (threading.Event() for _ in range(3))
        self.done: list[str] = []

    def block(self) -> None:
        self.began.set()
        assert self.open.wait(WAIT_S)

    def end(self) -> None:
        self.open.set()
        assert self.over.wait(WAIT_S)


@pytest.fixture
def aside() -> Iterator[Aside]:
    made = Aside("test")
    yield made
    made.close()


def test_tenants_have_their_turns(aside: Aside) -> None:
    gate = Gate()
    aside.put("a", gate.block)
    assert gate.began.wait(WAIT_S)
    for name in ("a0", "a1", "a2", "b0", "b1", "c0"):
        aside.put(name[0], lambda name=name: gate.done.append(name))  # type: ignore[misc]
    aside.put("a", gate.over.set)
    gate.end()
    assert gate.done == ["a0", "b0", "c0", "a1", "b1", "a2"]


def test_it_outlives_what_fails(aside: Aside) -> None:
    over = threading.Event()
    aside.put("a", lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    aside.put("a", over.set)
    assert over.wait(WAIT_S)


def test_what_has_not_begun_is_forgotten_at_the_end(aside: Aside) -> None:
    gate = Gate()
    aside.put("a", gate.block)
    assert gate.began.wait(WAIT_S)
    aside.put("a", lambda: gate.done.append("later"))
    aside.close()
    gate.open.set()
    aside._thread.join(WAIT_S)
    assert not aside._thread.is_alive()
    aside.put("a", lambda: gate.done.append("too late"))
    assert gate.done == []


def test_a_tenants_slow_grammars_leave_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was postponed or withdrawn meanwhile is not prepared any more."""
    monkeypatch.setattr(asides, "HELD_UP_S", -1.0)
    gate = Gate()
    postponed: list[Claim] = []

    def prepare(one: Claim, _: object) -> Sequence:
        if one.job.job_id == "a0":
            gate.block()
        gate.done.append(one.job.job_id)
        return Sequence(one, [1], None)

    nothing: Any = None
    arrivals = Arrivals(prepare, nothing, "base", lambda _: None, room=4)
    arrivals.submit([hers("a", 0)])
    assert gate.began.wait(WAIT_S)
    arrivals.submit([hers("a", n) for n in range(1, 6)])
    arrivals.submit([hers("b", n) for n in range(2)])
    arrivals.postpone = postponed.extend
    assert arrivals.take() == ([], {})
    assert [one.job.job_id for one in postponed] == ["a2", "a3", "a4", "a5"]
    arrivals.withdraw(["b0"], None)
    arrivals._compiling.put("b", gate.over.set)
    gate.end()
    assert gate.done == ["a0", "a1", "b1"]
    assert [sequence.job_id for sequence in arrivals.take()[0]] == gate.done
    assert arrivals.close() == {}


def hers(tenant: str, number: int) -> Claim:
    wanted = wants(f"{tenant}{number}", regex="x")
    return claim(wanted.model_copy(update={"tenant": tenant}))
