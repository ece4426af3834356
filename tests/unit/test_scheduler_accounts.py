"""What tenants are charged by the scheduler is what was computed for them, whatever happens."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabatch_worker.sequence import Sequence
from tests.scheduling import play, scheduler, sequence


@given(
    jobs=st.lists(
        st.tuples(
            st.integers(1, 14),
            st.integers(1, 9),
            st.sampled_from([None, "a-r1", "b-r2", "c-r3"]),
            st.integers(-1, 1),
            st.sampled_from("tuv"),
        ),
        max_size=40,
    ),
    taken_back=st.sets(st.integers(0, 39), max_size=10),
    rows=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_accounts_are_what_was_computed_whatever_happens(
    jobs: list[tuple[int, int, str | None, int, str]], taken_back: set[int], rows: bool
) -> None:
    s = scheduler(3, 16, 9, age_cap_s=1e9, rows=rows, pool_rows=4)
    tokens: dict[str, int] = defaultdict(int)
    made = []
    for number, (prompt, new, name, priority, tenant) in enumerate(jobs):
        made.append(sequence(f"j{number}", prompt, new, name, priority, tenant))
        s.add(made[-1])
        play(s, s.plan()[0])
        if number in taken_back:
            s.remove(f"j{number // 2}")
    while s.waiting or s.running:
        play(s, s.plan()[0])
    for one in made:
        if one.finish_reason is not None:
            tokens[one.claim.job.tenant] += one.length - one.cached_tokens
        else:
            tokens[one.claim.job.tenant] += one.charged_tokens
            assert one.charged_tokens <= one.length
    assert s.fair_share.served() == tokens
    assert s.fair_share.tenants == 0
    assert {a.reserved_tokens for a in s.fair_share._idle.values()} <= {0}


def test_jobs_that_are_refused_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    s = scheduler()

    def full(one: Sequence) -> bool:
        raise MemoryError

    monkeypatch.setattr(s.slots, "acquire", full)
    for tenant in "ab":
        for number in range(3):
            s.add(sequence(f"{tenant}{number}", name="large", tenant=tenant))
    assert s.plan() == ([], [])
    assert len(s.refused) == 6
    assert s.fair_share.tenants == 0
