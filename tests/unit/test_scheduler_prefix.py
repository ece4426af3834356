"""Beginnings that jobs share, and what happens when the blocks run out."""

from __future__ import annotations

import pytest

from lorabatch_worker.scheduler import Scheduler
from lorabatch_worker.sequence import Sequence
from tests.scheduling import play, run, scheduler, sequence


def kept_tokens(s: Scheduler, *jobs: Sequence) -> list[int]:
    """Cached tokens of jobs that run one after the other."""
    for job in jobs:
        s.add(job)
        run(s)
    return [job.cached_tokens for job in jobs]


@pytest.mark.usefixtures("layout")
def test_a_common_beginning_is_computed_once() -> None:
    # What a and b made themselves follows on token 10, so c shares only what is full before that.
    jobs = [sequence("a", 11), sequence("b", 11), sequence("c", 30), sequence("d", 8, first=1)]
    assert kept_tokens(scheduler(blocks=40, step_tokens=64), *jobs) == [0, 8, 8, 0]


@pytest.mark.usefixtures("layout")
def test_a_whole_cached_prompt_still_yields_its_first_token() -> None:
    assert kept_tokens(scheduler(), sequence("a", 8), sequence("b", 8)) == [0, 4]


@pytest.mark.usefixtures("layout")
def test_nothing_is_shared_between_tenants_or_adapters() -> None:
    jobs = [
        sequence("a", 11, name="x", tenant="t"),
        sequence("b", 11, name="x", tenant="u"),
        sequence("c", 11, name="y", tenant="t"),
        sequence("d", 11, name=None, tenant="t"),
        sequence("e", 11, name="x", tenant="t"),
    ]
    assert kept_tokens(scheduler(blocks=99), *jobs) == [0, 0, 0, 0, 8]


@pytest.mark.usefixtures("layout")
def test_what_a_broken_job_computed_is_not_shared() -> None:
    s = scheduler()
    broken, whole = sequence("broken", 11), sequence("whole", 11)
    s.add(broken)
    play(s, s.plan()[0])
    s.remove("broken")
    assert kept_tokens(s, whole) == [0]


@pytest.mark.usefixtures("layout")
def test_jobs_wait_for_the_beginning_that_another_is_computing() -> None:
    s = scheduler(step_tokens=64)
    jobs = [sequence(name, 11) for name in "abc"]
    for job in jobs:
        s.add(job)
    first, begun = s.plan()
    assert [a.job_id for a in begun] == ["a"]
    play(s, first)
    assert [a.job_id for a in s.plan()[1]] == ["b", "c"]
    assert [j.cached_tokens for j in jobs] == [0, 8, 8]


@pytest.mark.usefixtures("layout")
def test_an_idle_block_is_forgotten_when_it_is_needed() -> None:
    s = scheduler(blocks=3, max_seqs=1)
    jobs = [sequence("a", 11, new=1), sequence("b", 11, new=1, first=50), sequence("c", 11, new=1)]
    assert kept_tokens(s, *jobs) == [0, 0, 0]


@pytest.mark.usefixtures("layout")
def test_without_blocks_the_last_to_come_gives_way_and_loses_nothing() -> None:
    s = scheduler(blocks=6, step_tokens=64)
    jobs = [sequence("a", 8, new=12), sequence("b", 8, new=12, first=50)]
    for job in jobs:
        s.add(job)
    assert run(s) == ["a", "b"]
    assert s.preemptions > 0
    assert [(j.preempted, len(j.output)) for j in jobs] == [(False, 12), (True, 12)]


@pytest.mark.usefixtures("layout")
def test_the_prefix_cache_can_be_off() -> None:
    s = scheduler()
    s.blocks.prefix_cache = False
    assert kept_tokens(s, sequence("a", 11), sequence("b", 11)) == [0, 0]
