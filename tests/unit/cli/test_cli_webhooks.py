"""`lorabatch webhooks`: secrets, what was given up, and a sender of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

from lorabatch import Job, Ledger, Settings
from lorabatch.outbox import Outbox
from tests.command_line import Cli
from tests.played_worker import run_queued
from tests.receiver import receiving, until

URL = "https://hooks.example/lorabatch"


def ended(ledger: Ledger, *job_ids: str, url: str = URL) -> None:
    fields = {"prompt": "hi", "tenant": "acme", "webhook": url}
    ledger.accept([Job.parse({"job_id": job_id, **fields}) for job_id in job_ids])
    run_queued(ledger)


def give_up(ledger: Ledger) -> list[str]:
    out = Outbox(ledger.engine)
    rows = out.take(9, lambda host: 9, 60)
    for row in rows:
        out.end(row, "failed", 500, "the receiver answered 500")
    return sorted(row.webhook_id for row in rows)


def test_secrets(cli: Cli, ledger: Ledger) -> None:
    first = cli("webhooks", "secret", "create", "--tenant", "acme").stdout.strip()
    assert first.startswith("whsec_")
    assert "it has secret" in cli("webhooks", "secret", "create", "--tenant", "acme", code=2).stderr
    second = cli("webhooks", "secret", "rotate", "--tenant", "acme", "--overlap-h", "1")
    shown = cli("webhooks", "secret", "list").stdout
    assert "whsec_" not in shown
    new, old = (line.split()[0] for line in shown.splitlines()[-2:])
    revealed = cli("webhooks", "secret", "list", "--tenant", "acme", "--reveal").stdout
    assert first in revealed
    assert second.stdout.strip() in revealed
    assert "revoked" in cli("webhooks", "secret", "revoke", old).stdout
    assert f"{new}" in cli("webhooks", "secret", "list", "--tenant", "acme").stdout
    assert cli("webhooks", "secret", "list", "--tenant", "beta").stdout == "none\n"
    assert "no such secret" in cli("webhooks", "secret", "revoke", "x", code=2).stderr
    assert "wanted letters" in cli("webhooks", "secret", "create", "--tenant", "a b", code=2).stderr


def test_what_waits_and_what_was_given_up(cli: Cli, ledger: Ledger) -> None:
    assert cli("webhooks", "list").stdout == "none\n"
    ended(ledger, "a", "b")
    assert cli("webhooks", "list", "--failed").stdout == "none\n"
    assert "job.succeeded" in cli("webhooks", "list", "--tenant", "acme").stdout
    ids = give_up(ledger)
    assert cli("webhooks", "list").stdout == "none\n"
    lines = cli("webhooks", "list", "--failed", "--json").stdout.splitlines()
    failed = [json.loads(line) for line in lines]
    assert sorted(row["webhook_id"] for row in failed) == ids
    assert {(row["status"], row["error"]) for row in failed} == {(500, "the receiver answered 500")}
    assert cli("webhooks", "retry", ids[0]).stdout == f"{ids[0]}\n"
    assert ids[0] in cli("webhooks", "retry", ids[0], code=2).stderr
    assert cli("webhooks", "retry", "--all").stdout == f"{ids[1]}\n"
    assert cli("webhooks", "retry", "--all").stdout == "none\n"
    assert "give the ids" in cli("webhooks", "retry", code=2).stderr
    assert "wanted 1 or more" in _deliver_nothing(cli)


def _deliver_nothing(cli: Cli) -> str:
    os.environ["LORABATCH_WEBHOOK_SENDERS"] = "0"
    try:
        return cli("webhooks", "deliver", code=2).stderr
    finally:
        del os.environ["LORABATCH_WEBHOOK_SENDERS"]


def test_a_sender_of_its_own_ends_well_when_it_is_told_to(
    cli: Cli, ledger: Ledger, settings: Settings
) -> None:
    cli("webhooks", "secret", "create", "--tenant", "acme")
    env = {"HOME": str(settings.home), "WEBHOOK_PRIVATE": "1", "WEBHOOK_PORTS": "any"}
    more = {f"LORABATCH_{name}": value for name, value in env.items()}
    command = [sys.executable, "-m", "lorabatch_producer.cli", "webhooks", "deliver"]
    with receiving() as there:
        sender = subprocess.Popen(command, env={**os.environ, **more})
        try:
            ended(ledger, "a", url=f"http://127.0.0.1:{there.port}/")
            there.wait(1)
            until(lambda: Outbox(ledger.engine).counts()["waiting"] == 0)
            sender.send_signal(signal.SIGTERM)
            assert sender.wait(30) == 0
        finally:
            sender.kill()
            sender.wait()
    assert len(there.posts) == 1
