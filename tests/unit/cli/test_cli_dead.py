"""`lorabatch dead list|retry|drop` on a real database."""

from __future__ import annotations

import json
from pathlib import Path

from lorabatch import Job, Ledger
from lorabatch.errors import AttemptsExhausted
from lorabatch.ledger import Claim
from lorabatch.result import ErrorInfo, Result
from tests.bad_inputs import short
from tests.command_line import Cli
from tests.played_worker import fails, run_queued


def gives_up(claim: Claim) -> Result:
    error = ErrorInfo(code=AttemptsExhausted.code, message="it stopped \x1b[31m3 workers")
    return fails(claim).model_copy(update={"error": error})


def die(ledger: Ledger, *names: str) -> None:
    ledger.accept([Job(job_id=name, prompt="x", tenant=f"of-{name}") for name in names])
    run_queued(ledger, gives_up)


def listed(cli: Cli, *given: str) -> list[str]:
    found = cli("dead", "list", "--json", *given).stdout
    return [json.loads(line)["job_id"] for line in found.splitlines()]


def test_the_dead_are_listed(cli: Cli, ledger: Ledger) -> None:
    assert cli("dead", "list").stdout == "none\n"
    assert cli("dead", "list", "--json").stdout == ""
    ledger.accept([Job(job_id="other", prompt="x")])
    run_queued(ledger, fails)
    die(ledger, "a", "b")
    assert listed(cli) == ["a", "b"]
    assert listed(cli, "--tenant", "of-b") == ["b"]
    table = cli("dead", "list").stdout
    assert "of-a" in table
    assert "it stopped \\x1b[31m3 workers" in table
    assert "\x1b" not in table


def test_retry_prints_old_and_new(cli: Cli, ledger: Ledger) -> None:
    die(ledger, "a", "b", "c")
    old, arrow, new = cli("dead", "retry", "b").stdout.split()
    assert (old, arrow) == ("b", "->")
    assert ledger.states(["b", new]) == {"b": "failed", new: "queued"}
    assert listed(cli) == ["a", "c"]
    rest = cli("dead", "retry", "--all").stdout.splitlines()
    assert [line.split()[0] for line in rest] == ["a", "c"]
    assert ledger.counts() == {"failed": 3, "queued": 3}
    assert cli("dead", "retry", "--all").stdout == "none\n"


def test_as_many_are_retried_as_may_wait(cli: Cli, ledger: Ledger) -> None:
    die(ledger, "a", "b", "c")
    cli("tenants", "set", "--all", "--max-queued", "2")
    found = cli("dead", "retry", "--all", code=2)
    retried = [line.split()[0] for line in found.stdout.splitlines()]
    assert len(retried) == 2
    assert found.stderr.startswith(
        "lorabatch: all tenants together: 2 jobs may wait and as many do; 2 run again, 1 do not"
    )
    assert found.stderr.count("\n") == 1
    assert sorted(retried + listed(cli)) == ["a", "b", "c"], "the other one stays on the list"
    cli("tenants", "forget", "--all")
    assert cli("dead", "retry", "--all").stdout.split()[0] not in retried


def test_drop(cli: Cli, ledger: Ledger) -> None:
    die(ledger, "a", "b", "c")
    assert cli("dead", "drop", "a", "a").stdout == "1 dropped\n"
    assert listed(cli) == ["b", "c"]
    assert cli("dead", "drop", "--all").stdout == "2 dropped\n"
    assert listed(cli) == []
    assert ledger.counts() == {"failed": 3}


def test_one_that_is_not_dead_is_refused_with_all_that_were_asked_for(
    cli: Cli, ledger: Ledger
) -> None:
    die(ledger, "a")
    for command in ("retry", "drop"):
        found = cli("dead", command, "a", "nobody", code=2)
        assert "'nobody': not among the dead" in found.stderr
        assert "give the ids of jobs, or --all" in cli("dead", command, code=2).stderr
        assert "give the ids of jobs, or --all" in cli("dead", command, "a", "--all", code=2).stderr
    assert listed(cli) == ["a"]
    assert ledger.counts() == {"failed": 1}


def test_one_whose_file_was_submitted_again_runs_already(
    cli: Cli, ledger: Ledger, tmp_path: Path
) -> None:
    path = tmp_path / "in"
    path.write_bytes(short())
    cli("batch", "submit", path)
    run_queued(ledger, gives_up)
    (dead,) = listed(cli)
    assert "1 of them run again" in cli("batch", "submit", path).stdout
    assert ledger.counts() == {"failed": 1, "queued": 1}
    old, _, new = cli("dead", "retry", dead).stdout.split()[:3]
    assert old == dead
    assert ledger.states([new]) == {new: "queued"}
    assert ledger.counts() == {"failed": 1, "queued": 1}, "once"
    assert listed(cli) == []
