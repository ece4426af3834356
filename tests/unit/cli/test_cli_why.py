"""`lorabatch why`: what is said of a job that waits, runs or has ended."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from lorabatch import Job, Ledger, Settings
from lorabatch.batches import Batches
from lorabatch.errors import JobNotFound
from lorabatch.feed import Feed
from lorabatch.ledger import Start
from lorabatch.registry import SHARED, Registered, Registry
from lorabatch.tables import jobs
from lorabatch.tenants import Limits, Tenants
from lorabatch_producer import services, why
from lorabatch_producer.commands import why as why_command
from tests.command_line import Cli
from tests.played_worker import fails, run_queued

VERSION = "a" * 64


def accept(ledger: Ledger, *names: str, **fields: Any) -> None:
    ledger.accept([Job(job_id=name, prompt="x", **fields) for name in names])


def change(ledger: Ledger, job_id: str, **columns: Any) -> None:
    with ledger.engine.begin() as connection:
        connection.execute(sa.update(jobs).where(jobs.c.job_id == job_id).values(**columns))


def said(cli: Cli, job_id: str) -> str:
    return cli("why", job_id).stdout


def register(ledger: Ledger, tenant: str = SHARED) -> Registered:
    entry = Registered(tenant, "sql", VERSION, "/files", None, None, 1, 0)
    Registry(ledger.engine).add(entry)
    return entry


def test_one_that_was_not_sent_yet(cli: Cli, ledger: Ledger) -> None:
    accept(ledger, "j", tenant="acme")
    text = said(cli, "j")
    assert text.startswith("job j of tenant acme is queued since 20")
    assert "it is in the ledger and waits to be fed into queue 'lorabatch'" in text
    assert "0 jobs of its tenant come before it (its priority: 0)" in text
    assert "1 tenant has open jobs in this queue; its own has weight 1 of 1: 100%" in text
    assert "no estimate: nothing of its tenant ended in the last minute" in text
    assert "no worker seems to run" in text
    for absent in ("adapter", "deadline", "done by", "under way", "lost"):
        assert absent not in text


def test_one_whose_message_is_in_the_queue(cli: Cli, ledger: Ledger) -> None:
    accept(ledger, "j")
    Feed(ledger.engine, "lorabatch").take()
    assert "its message is in queue 'lorabatch' since 20" in said(cli, "j")
    claims = ledger.claim(["j"], "me", 60)
    ledger.release(list(claims.values()), again_s=600)
    text = said(cli, "j")
    assert re.search(r"while its adapter was being fetched: it comes again in (9|10)\.\d min", text)
    assert "its message is in queue" not in text


def test_an_unknown_one(cli: Cli, ledger: Ledger) -> None:
    assert "'nobody': no such job" in cli("why", "nobody", code=2).stderr
    with pytest.raises(JobNotFound):
        why.facts(ledger.engine, "nobody")


def test_its_adapter_s_version_set_aside(cli: Cli, ledger: Ledger) -> None:
    entry = register(ledger)
    accept(ledger, "j", adapter_id="sql")
    assert f"adapter 'sql' is bound to version {VERSION[:12]}\n" in said(cli, "j")
    registry = Registry(ledger.engine, "tiny")
    registry.set_aside(entry.key, "invalid_adapter", "NaN \x1b[31m")
    text = said(cli, "j")
    assert "that version failed once on workers of 'tiny' and is set aside until 20" in text
    assert "(invalid_adapter: NaN \\x1b[31m)" in text
    registry.forgive(entry.key)
    assert "set aside" not in said(cli, "j")


def test_an_adapter_that_nobody_registered(cli: Cli, ledger: Ledger) -> None:
    register(ledger, "other")
    accept(ledger, "j", adapter_id="sql")
    assert "adapter 'sql' was not registered when it was accepted" in said(cli, "j")


def test_a_suspect(cli: Cli, ledger: Ledger) -> None:
    accept(ledger, "j")
    change(ledger, "j", losses=1)
    assert "a worker that had it was lost once, after it had begun 0\n" in said(cli, "j")
    change(ledger, "j", crashes=2, losses=3)
    text = said(cli, "j")
    assert "was lost 3 times, after it had begun 2: it is suspected of stopping them" in text


def test_deadlines(cli: Cli, ledger: Ledger) -> None:
    soon, gone = (datetime.now(UTC) + timedelta(minutes=m) for m in (50.5, -50.5))
    accept(ledger, "soon", done_by=soon)
    accept(ledger, "gone", done_by=gone)
    assert f"to be done by {soon:%Y-%m-%d %H:%M:%S} UTC, within 50." in said(cli, "soon")
    text = said(cli, "gone")
    assert f"its deadline, {gone:%Y-%m-%d %H:%M:%S} UTC, passed 50." in text
    assert "it fails at the next look of a worker" in text


def test_one_that_runs(cli: Cli, ledger: Ledger) -> None:
    accept(ledger, "j")
    claim = ledger.claim(["j"], "me@here", 60)["j"]
    text = said(cli, "j")
    assert "is running since 20" in text
    assert "worker me@here has fetched it ahead: attempt 1 has not begun" in text
    ledger.mark_started([Start(claim)])
    ledger.cancel(["j"])
    text = said(cli, "j")
    assert "worker me@here runs it: attempt 1\n" in text
    assert "asked to stop" in text
    assert "lease" not in text
    assert "come before it" not in text
    change(ledger, "j", lease_expires_us=1)
    assert "its lease ran out" in said(cli, "j")


def test_one_that_has_ended(cli: Cli, ledger: Ledger) -> None:
    accept(ledger, "good")
    run_queued(ledger)
    text = said(cli, "good")
    assert "has ended, succeeded since 20" in text
    assert "its text ended by eos_token" in text
    assert "5 + 3 tokens" in text
    assert "worker" not in text
    accept(ledger, "bad", batch_id="b")
    run_queued(ledger, fails)
    assert "unknown_adapter: no adapter of that id" in said(cli, "bad")
    again = Batches(ledger.engine).run_again(["bad"]).jobs["bad"]
    assert f"its line runs again as job {again}" in said(cli, "bad")
    accept(ledger, "gone")
    ledger.cancel(["gone"])
    assert "job_cancelled: cancelled" in said(cli, "gone")


def test_json_has_the_facts_and_the_lines(cli: Cli, ledger: Ledger) -> None:
    register(ledger)
    accept(ledger, "j", adapter_id="sql", priority=7)
    found = json.loads(cli("why", "j", "--json").stdout)
    assert (found["state"], found["priority"], found["sent_us"]) == ("queued", 7, None)
    assert found["adapters"] == [{"adapter_id": "sql", "version": VERSION, "set_aside": []}]
    assert found["ahead"]["jobs"] == 0
    assert found["workers"] == {}
    assert found["lines"][0].startswith("job j of tenant default is queued")


def test_workers_that_answer(cli: Cli, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    accept(ledger, "j")
    pool = {"waiting": 1234, "running": 5, "max-concurrency": 32, "writes": {"a": 1}, "pid": "x"}
    figures = services._figures(pool)
    assert figures == {"waiting": 1234, "running": 5, "max-concurrency": 32}
    monkeypatch.setattr(why_command, "loads", lambda settings, queue: {"a@b": figures, "c@d": {}})
    assert "2 workers answer: a@b (1,234 waiting, 5 running), c@d\n" in said(cli, "j")


def test_where_its_adapter_is(cli: Cli, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    register(ledger)
    accept(ledger, "bound", adapter_id="sql", tenant="acme")
    accept(ledger, "free", adapter_id="pirate")
    accept(ledger, "base")
    asked: list[Any] = []
    found = {"w1": "device", "w2": "nowhere", "w3": "device", "w4": "memory", "w5": "disk"}

    def places(settings: Settings, *question: Any) -> dict[str, dict[str, str]]:
        asked.append(question)
        return dict.fromkeys(question[1], found)

    monkeypatch.setattr(why_command, "places", places)
    assert "adapter 'sql': no worker answered whether it has it\n" in said(cli, "bound")
    monkeypatch.setattr(why_command, "loads", lambda settings, queue: {name: {} for name in found})
    assert (
        "adapter 'sql' is on the device of w1, w3; in memory of w4; in the disk cache of w5; "
        "not yet with w2\n"
    ) in said(cli, "bound")
    assert "adapter 'pirate' is on the device" in said(cli, "free")
    assert "adapter" not in said(cli, "base")
    assert asked[1:] == [
        ("acme", {"sql": VERSION}, list(found)),
        ("default", {"pirate": None}, list(found)),
        ("default", {}, list(found)),
    ]
    found.clear()
    assert "adapter 'pirate': no worker answered whether it has it\n" in said(cli, "free")


def test_the_limit_is_reached(cli: Cli, ledger: Ledger) -> None:
    Tenants(ledger.engine).set(Limits("default", max_running=1))
    accept(ledger, "first")
    accept(ledger, "j")
    assert "its tenant may have 1 job under way and has 0\n" in said(cli, "j")
    change(ledger, "first", sent_us=1)
    assert "1 job under way and has 1: the limit is reached\n" in said(cli, "j")
    assert "limit is reached" not in said(cli, "first")
