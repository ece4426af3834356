"""`lorabatch tenants`, and refusals where as many jobs wait as may."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorabatch import Ledger, Settings
from lorabatch.errors import QueueFull
from lorabatch.feed import Feed
from lorabatch.keys import Keys
from lorabatch.tenants import ALL, EACH, Limits, Tenants
from lorabatch_producer import Producer
from lorabatch_producer.batch import submit
from tests.bad_inputs import short
from tests.command_line import Cli
from tests.played_worker import run_queued


def said(ledger: Ledger) -> list[Limits]:
    return Tenants(ledger.engine).list()


def test_what_is_left_out_stays_as_it_was(cli: Cli, ledger: Ledger) -> None:
    first = cli("tenants", "set", "acme", "--weight", "2.5", "--max-queued", "1000").stdout
    assert first == "acme: weight 2.5, any number under way, at most 1,000 may wait\n"
    cli("tenants", "set", "acme", "--max-running", "3")
    assert said(ledger) == [Limits("acme", 2.5, 3, 1000)]
    cli("tenants", "set", "acme", "--max-queued", "none")
    assert said(ledger) == [Limits("acme", 2.5, 3, None)]


def test_a_tenant_from_its_first_to_its_last_key(cli: Cli, ledger: Ledger) -> None:
    cli("tenants", "set", "--each", "--weight", "2", "--max-queued", "5")
    made = cli("tenants", "create", "acme")
    most = "any number under way, at most 5 (as each other) may wait"
    assert made.stdout == f"acme: weight 2, {most}\n"
    assert "lorabatch keys create --tenant acme" in made.stderr
    assert Limits("acme", 2.0) in said(ledger)
    cli("tenants", "set", "acme", "--max-running", "3")
    assert "is there already" in cli("tenants", "create", "acme", code=2).stderr
    assert Limits("acme", 2.0, 3) in said(ledger), "as it was"
    keys = [
        cli("keys", "create", "--tenant", who).stdout.strip() for who in ("acme", "acme", "other")
    ]
    assert cli("tenants", "revoke", "acme").stdout == "acme: 2 keys revoked\n"
    assert cli("tenants", "revoke", "acme").stdout == "acme: 0 keys revoked\n"
    valid = [Keys(ledger.engine).check(key) for key in keys]
    assert [key and key.tenant for key in valid] == [None, None, "other"]
    assert "wanted letters, digits" in cli("tenants", "revoke", "*all", code=2).stderr


def test_0_pauses_a_tenant_and_none_ends_that(cli: Cli, ledger: Ledger) -> None:
    cli("tenants", "set", "--each", "--max-running", "5", "--max-queued", "5")
    waits = cli("enqueue", "hi", "--tenant", "acme").stdout.strip()
    Feed(ledger.engine, "lorabatch").give_back([waits])
    paused = cli("tenants", "set", "acme", "--max-running", "0", "--max-queued", "0").stdout
    assert paused == "acme: weight 1, none under way, none may wait\n"
    assert said(ledger)[1] == Limits("acme", 1.0, 0, 0)
    assert Feed(ledger.engine, "lorabatch").take() == []
    refused = cli("enqueue", "hi", "--tenant", "acme", code=2).stderr
    assert "tenant 'acme': no jobs may wait; nothing of this call was accepted: raise" in refused
    ended = cli("tenants", "set", "acme", "--max-running", "none", "--max-queued", "none").stdout
    assert ended == (
        "acme: weight 1, at most 5 (as each other) under way, at most 5 (as each other) may wait\n"
    )
    assert [m.job_id for m in Feed(ledger.engine, "lorabatch").take()] == [waits]
    cli("enqueue", "hi", "--tenant", "acme")
    cli("tenants", "set", "--all", "--max-queued", "0")
    assert "together: no jobs may wait" in cli("enqueue", "hi", code=2).stderr


def test_each_and_all(cli: Cli, ledger: Ledger) -> None:
    cli("tenants", "set", "--each", "--weight", "2", "--max-running", "4")
    assert cli("tenants", "set", "--all", "--max-queued", "9").stdout == (
        "(all together): at most 9 may wait\n"
    )
    cli("tenants", "set", "acme", "--max-running", "1")
    assert {limits.tenant: limits for limits in said(ledger)} == {
        EACH: Limits(EACH, 2.0, 4, None),
        ALL: Limits(ALL, 1.0, None, 9),
        "acme": Limits("acme", 2.0, 1, None),
    }, "a weight is kept that it had as one of the others"


def test_how_much_may_be_asked_for_in_a_minute(cli: Cli, ledger: Ledger) -> None:
    cli("tenants", "set", "--each", "--tokens-per-minute", "5000")
    words = ("tenants", "set", "acme", "--requests-per-minute")
    assert cli(*words, "60").stdout == (
        "acme: weight 1, any number under way, any number may wait, at most 60 requests a minute, "
        "at most 5,000 (as each other) tokens a minute\n"
    )
    assert said(ledger)[1] == Limits("acme", requests_per_minute=60)
    assert " 60 " in cli("tenants", "list").stdout
    cli(*words, "none", "--tokens-per-minute", "0")
    assert said(ledger)[1] == Limits("acme", tokens_per_minute=0)


def test_list_and_forget(cli: Cli, ledger: Ledger) -> None:
    assert "none: every tenant has weight 1 and no limit" in cli("tenants", "list").stdout
    assert cli("tenants", "list", "--json").stdout == ""
    cli("tenants", "set", "acme", "--max-queued", "12345")
    cli("tenants", "set", "--each", "--weight", "0.5")
    table = cli("tenants", "list").stdout
    assert "12,345" in table
    assert "(each other)" in table
    found = [json.loads(line) for line in cli("tenants", "list", "--json").stdout.splitlines()]
    acme = {"tenant": "acme", "weight": 1.0, "max_running": None, "max_queued": 12345}
    assert {**acme, "requests_per_minute": None, "tokens_per_minute": None} in found
    assert cli("tenants", "forget", "acme").stdout == "acme: forgotten\n"
    assert cli("tenants", "forget", "acme").stdout == "acme: nothing was said of it\n"
    cli("tenants", "forget", "--each")
    assert said(ledger) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give NAME, --each or --all"),
        (["acme", "--each"], "give NAME, --each or --all"),
        (["--all", "--each"], "give NAME, --each or --all"),
        (["acme"], "give --weight, --max-running or --max-queued, --requests-per-minute or"),
        (["acme", "--tokens-per-minute", "1e6"], "wanted 0 to 2,147,483,647, or none"),
        (["--all", "--max-queued", "1", "--requests-per-minute", "2"], "--max-queued, and nothing"),
        (["*each", "--weight", "1"], "wanted letters, digits"),
        (["a\x1b[31m", "--weight", "1"], "wanted letters, digits"),
        (["a" * 65, "--weight", "1"], "at most 64"),
        (["", "--weight", "1"], "wanted letters, digits"),
        (["acme", "--weight", "0"], "0 is no number above 0"),
        (["acme", "--weight", "-1"], "-1 is no number above 0"),
        (["acme", "--weight", "nan"], "nan is no number above 0"),
        (["acme", "--weight", "inf"], "inf is no number above 0"),
        (["acme", "--max-running", "-1"], "'--max-running'"),
        (["acme", "--max-queued", "1.5"], "'--max-queued'"),
        (["acme", "--max-queued", "2147483648"], "wanted 0 to 2,147,483,647, or none"),
        (["--all", "--weight", "2"], "--max-queued, and nothing else"),
        (["--all", "--max-running", "2", "--max-queued", "2"], "--max-queued, and nothing else"),
    ],
)
def test_what_cannot_be_said(cli: Cli, ledger: Ledger, arguments: list[str], message: str) -> None:
    found = cli("tenants", "set", *arguments, code=2).stderr
    assert "\x1b" not in found
    assert message in " ".join(found.replace("│", "").split())
    assert said(ledger) == []


def test_a_full_queue_refuses_a_job_in_one_line(cli: Cli, ledger: Ledger) -> None:
    cli("tenants", "set", "acme", "--max-queued", "1")
    job_id = cli("enqueue", "hi", "--tenant", "acme", "--key", "k").stdout.strip()
    found = cli("enqueue", "hi", "--tenant", "acme", code=2)
    assert found.stdout == ""
    assert found.stderr.startswith("lorabatch: tenant 'acme': 1 jobs may wait")
    assert found.stderr.count("\n") == 1
    assert cli("enqueue", "hi", "--tenant", "acme", "--key", "k").stdout.strip() == job_id
    cli("enqueue", "hi", "--tenant", "other")
    assert ledger.counts() == {"queued": 2}


def test_a_file_that_finds_a_full_queue_goes_on_where_it_ended(
    cli: Cli, ledger: Ledger, tmp_path: Path
) -> None:
    path = tmp_path / "in"
    path.write_bytes(b"\n".join(short(prompt=f"p{n}") for n in range(25)))
    cli("tenants", "set", "--each", "--max-queued", "11")
    found = cli("batch", "submit", path, code=2)
    assert "11 lines accepted, the rest not: tenant 'default': 11 jobs may wait" in found.stderr
    assert "submit the same file again" in found.stderr
    assert found.stderr.count("\n") == 1
    assert ledger.counts() == {"queued": 11}
    batch_id = found.stderr.split("batch ")[1].split(":")[0]
    assert "0 of 11 done" in cli("batch", "status", batch_id).stdout
    run_queued(ledger)
    assert "22 lines accepted, the rest not" in cli("batch", "submit", path, code=2).stderr
    run_queued(ledger)
    done = cli("batch", "submit", path).stdout
    assert "25 lines accepted, 0 bad" in done
    assert ledger.counts(done.split()[1]) == {"succeeded": 22, "queued": 3}


def test_as_many_failed_lines_run_again_as_may_wait(
    cli: Cli, ledger: Ledger, tmp_path: Path
) -> None:
    path = tmp_path / "in"
    path.write_bytes(b"\n".join(short(prompt=f"p{n}") for n in range(5)))
    batch_id = cli("batch", "submit", path).stdout.split()[1]
    cli("batch", "cancel", batch_id)
    cli("tenants", "set", "--each", "--max-queued", "2")
    found = cli("batch", "submit", path, code=2)
    assert "5 lines accepted, 2 of them run again, the rest not: tenant 'default'" in found.stderr
    assert ledger.counts(batch_id) == {"queued": 2, "cancelled": 3}
    run_queued(ledger)
    assert "2 of them run again" in cli("batch", "submit", path, code=2).stderr
    run_queued(ledger)
    assert "1 of them run again" in cli("batch", "submit", path).stdout


def test_a_program_gets_an_error_of_the_tree(
    cli: Cli, ledger: Ledger, settings: Settings, tmp_path: Path
) -> None:
    cli("tenants", "set", "--all", "--max-queued", "2")
    path = tmp_path / "in"
    path.write_bytes(b"\n".join(short(prompt=f"p{n}") for n in range(3)))
    with Producer(settings) as producer:
        with pytest.raises(QueueFull, match="2 lines accepted, the rest not: all tenants"):
            submit(producer, path)
        with pytest.raises(QueueFull, match="all tenants together: 2 jobs may wait"):
            producer.enqueue(prompt="x")
    assert ledger.counts() == {"queued": 2}
