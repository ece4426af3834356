"""A job that may be what stops the workers runs alone, and not at the cost of all others."""

from __future__ import annotations

from dataclasses import replace

from lorabatch_worker.scheduler import Scheduler
from lorabatch_worker.sequence import Sequence
from tests.scheduling import play, scheduler, sequence

NEVER_S, AT_ONCE_S = 1e9, -1.0


def suspect(job_id: str, new: int = 4) -> Sequence:
    one = sequence(job_id, new=new)
    one.claim = replace(one.claim, crashes=2)
    return one


def together(s: Scheduler, steps: int = 100) -> list[set[str]]:
    """Which jobs ran in each step, until nothing is left."""
    seen = []
    for _ in range(steps):
        chunks, _ = s.plan()
        if chunks:
            seen.append({chunk.sequence.job_id for chunk in chunks})
        play(s, chunks)
        if not (s.waiting or s.running):
            return seen
    raise AssertionError(f"still here: {[*s.waiting, *s.running]}")


def test_it_runs_with_nobody_else() -> None:
    for age_cap_s in (NEVER_S, AT_ONCE_S):
        s = scheduler(age_cap_s=age_cap_s)
        for one in (sequence("a"), suspect("s"), sequence("b"), suspect("t"), sequence("c")):
            s.add(one)
        seen = together(s)
        assert {"s"} in seen
        assert {"t"} in seen
        assert all(len(jobs) == 1 for jobs in seen if jobs & {"s", "t"})
        assert age_cap_s == AT_ONCE_S or {"a", "b", "c"} in seen


def test_others_go_first_until_it_has_waited_for_long() -> None:
    s = scheduler(max_seqs=2, age_cap_s=NEVER_S)
    s.add(suspect("s"))
    s.add(sequence("first"))
    s.plan()
    assert set(s.running) == {"s"}, "nobody ran, so it could"

    s = scheduler(max_seqs=2, age_cap_s=NEVER_S)
    s.add(sequence("first", new=40))
    s.plan()
    s.add(suspect("s"))
    s.add(sequence("second", new=40))
    s.plan()
    assert set(s.running) == {"first", "second"}


def test_a_steady_flow_does_not_keep_it_out_for_ever() -> None:
    s = scheduler(max_seqs=2, age_cap_s=AT_ONCE_S)
    s.add(sequence("first", new=6))
    s.plan()
    s.add(suspect("s"))
    for number in range(60):
        s.add(sequence(f"more-{number}", new=6))
        chunks, _ = s.plan()
        if "s" in s.running:
            assert set(s.running) == {"s"}
            return
        play(s, chunks)
    raise AssertionError("it never ran")
