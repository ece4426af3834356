"""Steps for which there is not enough memory, and a device that takes no more work."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorabatch_worker import engine as engines
from lorabatch_worker.memory import out_of_memory
from lorabatch_worker.portions import GOOD, Portions
from lorabatch_worker.scheduler import Chunk
from lorabatch_worker.sequence import Family
from tests.desk import PROMPTS, Desk, job, leave_nothing, long

Chunks = list[Chunk]
NAMES = ("all", "attention", None, "dora", "patterns", None)


def tokens_of(chunks: Chunks) -> int:
    return sum(c.end - c.start for c in chunks)


@pytest.fixture
def memory(own: Desk, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Chunks], bool]], Any]:
    """Have the engine's device run out of memory at such steps: the sizes of those that fitted."""
    forward = own.engine.runner.forward

    def lacks(too_much: Callable[[Chunks], bool]) -> list[int]:
        fitted: list[int] = []

        def tried(chunks: Chunks) -> Any:
            if too_much(chunks):
                raise torch.OutOfMemoryError("secret detail")
            fitted.append(tokens_of(chunks))
            return forward(chunks)

        monkeypatch.setattr(own.engine.runner, "forward", tried)
        return fitted

    return lacks


@pytest.mark.parametrize("room", [1, 5, 40])
def test_a_step_that_does_not_fit_is_computed_in_portions_with_the_same_tokens(
    room: int, own: Desk, memory: Any
) -> None:
    def batch(name: str) -> list[Any]:
        return [
            job(f"{name}-{i}", PROMPTS[i % len(PROMPTS)], adapter, max_new_tokens=12)
            for i, adapter in enumerate(NAMES)
        ]

    wanted = own.run(*batch("wanted"))
    fitted = memory(lambda chunks: tokens_of(chunks) > room)
    results = own.run(*batch("small"))
    for i in range(len(NAMES)):
        assert results[f"small-{i}"].token_ids == wanted[f"wanted-{i}"].token_ids
    assert max(fitted) <= room
    usages = [result.usage for result in results.values()]
    assert sum(fitted) == sum(u.total_tokens - u.cached_tokens - 1 for u in usages), "none twice"
    leave_nothing(own.engine)


def test_the_one_that_does_not_fit_even_alone_fails_and_nobody_else(own: Desk, memory: Any) -> None:
    wanted = own.run(job("wanted", adapter="all"))["wanted"]
    memory(lambda chunks: any(c.sequence.job_id == "huge" and c.end > 20 for c in chunks))
    results = own.run(*(job(f"fine-{i}", adapter="all") for i in range(5)), job("huge", PROMPTS[3]))
    error = results.pop("huge").error
    assert error is not None
    assert error.code == "oom"
    assert "token 21" in error.message
    assert "secret" not in error.message
    assert {r.token_ids for r in results.values()} == {wanted.token_ids}
    assert own.engine.portions.most_tokens is None, "the others need no portions"
    leave_nothing(own.engine)


def test_memory_that_lacks_after_the_launch_fails_that_portion_alone(
    own: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was computed is noted by then: to compute it again would not be the same step."""
    launch = own.engine._launch

    def lost(portion: Chunks) -> Any:
        draw: Any = launch(portion)
        if any(c.sequence.job_id == "unlucky" for c in portion):
            monkeypatch.setattr(draw, "wait", lambda: torch.empty(1 << 60))
        return draw

    monkeypatch.setattr(own.engine, "_launch", lost)
    error = own.run(job("unlucky"))["unlucky"].error
    assert error is not None
    assert error.code == "engine_fault"
    assert own.run(job("after"))["after"].state == "succeeded"
    leave_nothing(own.engine)


def test_what_is_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as hosts:
        torch.empty(1 << 60)
    assert out_of_memory(hosts.value)
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError())
    assert out_of_memory(torch.AcceleratorError("CUDA error: out of memory"))
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))
    assert not out_of_memory(RuntimeError("shape"))


def test_portions_grow_again() -> None:
    class Sequence:
        key = "a"
        computed = 0
        family = Family([])

    chunks = [Chunk(Sequence(), 0, 40)]  # type: ignore[arg-type]
    portions = Portions()
    portions.halve(chunks)
    portions.halve(portions.next(chunks))
    assert [(c.start, c.end) for c in portions.next(chunks)] == [(0, 10)]
    for _ in range(GOOD):
        portions.fitted(40)
    assert portions.most_tokens == 20
    for _ in range(GOOD):
        portions.fitted(40)
    assert portions.most_tokens is None


def test_memory_that_somebody_else_has_is_waited_for(
    own: Desk, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "IDLE_WAIT_S", 0.001)
    wanted = own.run(job("wanted", adapter="all"))["wanted"]
    tries: list[int] = []

    def taken(chunks: Chunks) -> bool:
        while own.engine.arrivals.preparing:  # one that is alone would soon be blamed
            time.sleep(0.001)
        tries.append(tokens_of(chunks))
        return len(tries) < 100

    memory(taken)
    results = own.run(*(job(f"j{i}", adapter="all") for i in range(4)))
    assert {r.token_ids for r in results.values()} == {wanted.token_ids}
    assert min(tries) == 1, "no smaller ones were left to try"
    leave_nothing(own.engine)


def test_one_that_is_alone_and_does_not_fit_fails(
    own: Desk, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "IDLE_WAIT_S", 0.001)
    memory(lambda _: True)
    error = own.run(job("alone"))["alone"].error
    assert error is not None
    assert error.code == "oom"


def test_a_device_that_never_has_memory_is_given_up_and_nobody_blamed(
    own: Desk, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "IDLE_WAIT_S", 0.001)
    memory(lambda _: True)
    own.submit(job("one"), job("two"))
    assert own.wait_broken() == []
    assert {claim.job.job_id for claim in own.engine.drain(0)} == {"one", "two"}
    assert own.reported() == []


@pytest.mark.parametrize("where", ["step", "adapter"])
def test_a_lost_device_ends_the_engine_and_its_jobs_are_handed_back(
    where: str, own: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = own.engine
    assert own.run(job("before"))["before"].state == "succeeded"

    def broken(*_: Any) -> Any:
        monkeypatch.setattr(engine.runner, "settle", lambda: False)
        raise torch.AcceleratorError("an illegal memory access was encountered")

    if where == "step":
        monkeypatch.setattr(engine.runner, "forward", broken)
    else:
        monkeypatch.setattr(engine.scheduler.slots, "_load", broken)
    own.submit(long("blamed", adapter="all"))
    assert own.wait_broken() == ["blamed"]
    own.submit(job("late"))
    left = {claim.job.job_id for claim in engine.drain(0)}
    assert left >= {"late"}
    assert own.reported() == ["before"], "nobody's outcome but of what had ended"
