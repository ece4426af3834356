"""Jobs that stop their workers: suspected, run alone, given up, and then a person's."""

from __future__ import annotations

import pytest

from lorabatch import Job, Ledger, Result
from lorabatch.batches import Batches
from lorabatch.dead import DeadLetters
from lorabatch.errors import AttemptsExhausted, JobNotFound
from lorabatch.ledger import Claim, Outcome, Start
from lorabatch.result import ErrorInfo
from lorabatch.tenants import ALL, Limits, Tenants


def lose(ledger: Ledger, job_id: str, begun: bool) -> Claim:
    """A worker claims it, says that it began or not, and is never heard of again."""
    claim = ledger.claim([job_id], "worker", -1)[job_id]
    if begun:
        ledger.mark_started([Start(claim)])
    return claim


def die(ledger: Ledger, *names: str) -> None:
    ledger.accept([Job(job_id=name, prompt="x", tenant=f"of-{name}") for name in names])
    error = ErrorInfo(code=AttemptsExhausted.code, message="why")
    claims = ledger.claim(names, "me", 30)
    ledger.record(
        [
            Outcome(
                c, Result(job_id=i, tenant=f"of-{i}", adapter_id=None, state="failed", error=error)
            )
            for i, c in claims.items()
        ]
    )


def test_one_that_began_before_two_crashes_is_a_suspect_and_dies_of_a_third(ledger: Ledger) -> None:
    ledger.accept([Job(job_id="j", prompt="x")])
    seen = [lose(ledger, "j", begun=True) for _ in range(4)]
    assert [(c.crashes, c.suspect, c.died_alone) for c in seen] == [
        (0, False, False),
        (1, False, False),
        (2, True, False),
        (3, True, True),
    ]


def test_one_that_was_only_fetched_ahead_is_no_suspect_for_longer(ledger: Ledger) -> None:
    ledger.accept([Job(job_id="j", prompt="x")])
    seen = [lose(ledger, "j", begun=False) for _ in range(6)]
    assert [c.suspect for c in seen] == [False] * 4 + [True] * 2
    assert not any(c.died_alone for c in seen), "it never ran"
    lose(ledger, "j", begun=True)
    assert ledger.claim(["j"], "me", 30)["j"].died_alone


def test_handing_back_is_no_crash(ledger: Ledger) -> None:
    ledger.accept([Job(job_id="j", prompt="x")])
    for _ in range(5):
        claim = ledger.claim(["j"], "me", 30)["j"]
        ledger.mark_started([Start(claim)])
        ledger.release([claim])
    assert (claim.crashes, claim.losses, claim.suspect) == (0, 0, False)


def test_the_dead_are_listed_until_somebody_handles_them(ledger: Ledger) -> None:
    die(ledger, "a", "b", "c")
    dead = DeadLetters(ledger.engine)
    assert [letter.job_id for letter in dead.list()] == ["a", "b", "c"]
    assert [letter.reason for letter in dead.list("of-b")] == ["why"]
    dead.drop(["c"])
    again = dead.retry(["a"]).jobs
    assert [letter.job_id for letter in dead.list()] == ["b"]
    assert ledger.states(["a", again["a"]]) == {"a": "failed", again["a"]: "queued"}
    job = ledger.claim([again["a"]], "me", 30)[again["a"]].job
    assert (job.prompt, job.tenant) == ("x", "of-a")
    for handled in ("a", "c", "nobody"):
        with pytest.raises(JobNotFound, match=f"'{handled}': not among the dead"):
            dead.retry([handled])


def test_one_that_runs_again_already_is_handled(ledger: Ledger) -> None:
    die(ledger, "a")
    again = Batches(ledger.engine).run_again(["a"])
    Tenants(ledger.engine).set(Limits(ALL, max_queued=1))
    dead = DeadLetters(ledger.engine)
    assert dead.retry(["a"]) == again
    assert dead.list() == []
    assert ledger.counts() == {"failed": 1, "queued": 1}, "once"
