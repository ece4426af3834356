"""Status, reports, database, settings and help by the command line; what it never prints."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import sqlalchemy as sa

from lorabatch import Ledger, Settings
from lorabatch.embedded import valkey_running
from lorabatch.tables import usage_events
from lorabatch_producer import services
from lorabatch_producer.console import printable
from tests.command_line import Cli
from tests.later import newest
from tests.played_worker import run_queued


def test_status_tells_the_whole_urls_only_when_asked(cli: Cli, home: Path, valkey_url: str) -> None:
    assert f"LORABATCH_BROKER_URL={valkey_url}" in cli("status", "--urls").output
    assert valkey_url not in cli("status").output


def test_status(cli: Cli, ledger: Ledger, home: Path, file: Path) -> None:
    before = cli("status").stdout
    assert "broker   embedded, not running" in before
    assert valkey_running(home) is None
    job_id = cli("enqueue", "hi").stdout.strip()
    after = cli("status").stdout
    assert "jobs     1 queued, 0 running, 0 succeeded" in after
    assert "queues   lorabatch 1, celery 0" in after
    assert "redis://:***@127.0.0.1:" in after
    assert "workers  none: no worker seems to run" in after
    assert cli("status", job_id).stdout == f"job {job_id} is queued\n"
    batch_id = cli("batch", "submit", file, code=1).stdout.split()[1]
    assert "0 of 2 done" in cli("status", batch_id).stdout
    assert "'nobody': no such job or batch" in cli("status", "nobody", code=2).stderr


def test_reports(cli: Cli, ledger: Ledger) -> None:
    cli("enqueue", "hi", "--adapter", "sql", "--tenant", "acme")
    run_queued(ledger)
    table = cli("report", "usage").stdout
    assert "acme" in table
    assert "total" in table
    rows = list(csv.DictReader(io.StringIO(cli("report", "usage", "--format", "csv").stdout)))
    assert [(row["tenant"], row["total_tokens"]) for row in rows] == [("acme", "8")]
    by_day = cli("report", "usage", "--by", "day, batch", "--format", "json").stdout
    assert json.loads(by_day)[0]["billable_tokens"] == 8
    nothing = cli("report", "usage", "--until", "2020-01-01", "--format", "json").stdout
    assert json.loads(nothing) == []
    assert cli("report", "audit").stdout == "1 jobs, 0 differences\n"
    with ledger.engine.begin() as connection:
        connection.execute(sa.update(usage_events).values(input_tokens=4))
    found = cli("report", "audit", code=1)
    assert "usage input_tokens: seen 4, wanted 5" in found.stdout
    assert "1 jobs, 3 differences" in found.stderr


def test_a_bad_setting_is_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORABATCH_MAX_SEQS", "many")
    for command in ("status", "doctor", "settings", "stop"):
        found = cli(command, code=2)
        assert found.stderr.startswith("lorabatch: LORABATCH_MAX_SEQS: ")
        assert found.stderr.count("\n") == 1


def test_db(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "at schema none" in cli("db", "check", code=2).stderr
    assert cli("db", "upgrade").stdout.endswith(f": empty -> {newest()}\n")
    assert cli("db", "upgrade").stdout.endswith(f": at {newest()} already\n")
    cli("db", "check")
    monkeypatch.setenv("LORABATCH_DATABASE_URL", "postgresql://u:hunter2@127.0.0.1:1/x")
    found = cli("db", "check", code=2).stderr + cli("db", "upgrade", code=2).stderr
    assert "does not answer" in found
    assert "hunter2" not in found


def test_db_on_postgresql(cli: Cli, monkeypatch: pytest.MonkeyPatch, postgres_url: str) -> None:
    monkeypatch.setenv("LORABATCH_DATABASE_URL", postgres_url)
    assert "run `lorabatch db upgrade`" in cli("enqueue", "hi", code=2).stderr
    assert f"empty -> {newest()}" in cli("db", "upgrade").stdout
    cli("enqueue", "hi")
    assert "1 queued" in cli("status").stdout
    assert "1 jobs, 0 differences" in cli("report", "audit").stdout


def test_stop(cli: Cli, home: Path) -> None:
    assert "was not running" in cli("stop").stdout
    cli("enqueue", "hi")
    assert "stopped" in cli("stop").stdout
    assert valkey_running(home) is None
    cli("enqueue", "hi")
    assert "queues   lorabatch 2" in cli("status").stdout


def test_settings_shows_all(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORABATCH_ADAPTERS", "sql=/x,org/a@v1")
    found = cli("settings").stdout
    assert all("LORABATCH_" + name.upper() in found for name in Settings.model_fields)
    assert "sql=/x,org/a=org/a@v1" in found


def test_the_default_of_consume_follows_the_queue(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORABATCH_QUEUE", "second")
    (line,) = [line for line in cli("settings").stdout.splitlines() if "_CONSUME" in line]
    assert [word.strip() for word in line.split("│")[1:3]] == ["second", "second"]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@h:1/0", "redis://:***@h:1/0"),
        ("rediss://u:p@ss@h/0", "rediss://u:***@h/0"),
        ("redis+socket:///x?password=p&db=1", "redis+socket:///x?password=***&db=1"),
        ("postgresql+psycopg://u:p@h/x", "postgresql+psycopg://u:***@h/x"),
        ("postgresql://h/x", "postgresql://h/x"),
        ("redis://h:1/0", "redis://h:1/0"),
    ],
)
def test_passwords_are_masked(url: str, shown: str) -> None:
    assert services.masked(url) == shown


def test_text_cannot_act_on_the_terminal() -> None:
    assert printable("a\x1b[31m\nü🦜") == "a\\x1b[31m\\nü🦜"


def test_help_and_version(cli: Cli) -> None:
    assert cli("--version").stdout == "lorabatch 0.1.0\n"
    for group in ([], ["batch"], ["report"], ["db"], ["enqueue"], ["doctor"]):
        assert "--help" in cli(*group, "--help").stdout
    cli(code=2)
