"""Jobs by the command line: enqueued, waited for, cancelled, and every refusal in one line."""

from __future__ import annotations

import json

import pytest
import sqlalchemy as sa

from lorabatch import Ledger
from lorabatch.tables import jobs as rows
from lorabatch_producer.commands import jobs
from tests.command_line import Cli
from tests.played_worker import fails, run_queued, working


def test_enqueue_prints_the_id_and_nothing_else(cli: Cli, ledger: Ledger) -> None:
    job_id = cli("enqueue", "hi", "--adapter", "sql", "--tenant", "acme").stdout.strip()
    claim = ledger.claim([job_id], "me", 60)[job_id]
    assert [(m.role, m.content) for m in claim.job.messages or ()] == [("user", "hi")]
    assert (claim.job.adapter_id, claim.job.tenant) == ("sql", "acme")


def test_enqueue_takes_every_option(cli: Cli, ledger: Ledger) -> None:
    options = (
        "--max-new-tokens 7 --temperature 0.5 --top-k 4 --top-p 0.9 --min-p 0.1 --seed 3 "
        "--repetition-penalty 1.1 --stop x --stop y --priority 5 --key k --raw --json "
        "--webhook https://shop.example/hook"
    )
    job_id = json.loads(cli("enqueue", "hi", *options.split()).stdout)["job_id"]
    assert json.loads(cli("enqueue", "hi", *options.split()).stdout)["job_id"] == job_id
    job = ledger.claim([job_id], "me", 60)[job_id].job
    params = job.sampling_params
    assert (job.prompt, job.messages, job.priority, job.idempotency_key) == ("hi", None, 5, "k")
    assert (params.max_new_tokens, params.temperature, params.top_k, params.top_p) == (
        7,
        0.5,
        4,
        0.9,
    )
    assert (params.min_p, params.seed, params.repetition_penalty) == (0.1, 3, 1.1)
    assert params.stop == ("x", "y")
    with ledger.engine.connect() as connection:
        assert connection.scalar(sa.select(rows.c.webhook)) == "https://shop.example/hook"


def test_a_system_message(cli: Cli, ledger: Ledger) -> None:
    job_id = cli("enqueue", "hi", "--system", "be short").stdout.strip()
    messages = ledger.claim([job_id], "me", 60)[job_id].job.messages or ()
    assert [m.role for m in messages] == ["system", "user"]
    assert "--system needs a chat" in cli("enqueue", "a", "--system", "b", "--raw", code=2).stderr


def test_enqueue_and_wait(cli: Cli, ledger: Ledger) -> None:
    with working(ledger):
        found = cli("enqueue", "how many?", "--adapter", "sql", "--wait")
        whole = cli("enqueue", "how many?", "--adapter", "sql", "--wait", "--json")
    assert found.stdout == "sql: how many?\n"
    assert found.stderr.startswith("adapter sql, 5 + 3 tokens, ")
    assert json.loads(whole.stdout)["usage"]["output_tokens"] == 3


def test_who_waits_for_nobody_is_told(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "QUIET_S", 0.0)
    found = cli("enqueue", "hi", "--wait", "--timeout", "0.3", code=2)
    assert "no worker seems to run: start `lorabatch-worker`" in found.stderr
    assert "is queued after 0.3 s" in found.stderr


def test_a_failed_job_is_one_line(cli: Cli, ledger: Ledger) -> None:
    with working(ledger, fails):
        found = cli("enqueue", "hi", "--wait", code=2)
        whole = cli("enqueue", "hi", "--wait", "--json", code=2)
    assert found.stdout == ""
    assert "unknown_adapter: no adapter of that id" in found.stderr
    assert found.stderr.count("\n") == 1
    assert json.loads(whole.stdout)["error"]["code"] == "unknown_adapter"


def test_a_broker_that_is_down(cli: Cli, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORABATCH_BROKER_URL", "redis://:hunter2@127.0.0.1:1/0")
    found = cli("enqueue", "hi", code=2)
    assert ledger.states([found.stdout.strip()]) == {found.stdout.strip(): "queued"}
    assert "is accepted, but not in the queue yet" in found.stderr
    assert "the broker does not answer" in cli("status", code=2).stderr
    assert "hunter2" not in cli("settings").output + cli("doctor", code=1).output


def test_result_and_cancel(cli: Cli, ledger: Ledger) -> None:
    done = cli("enqueue", "hi").stdout.strip()
    assert "has no result yet: it is queued" in cli("result", done, code=2).stderr
    run_queued(ledger)
    assert cli("result", done).stdout == "None: hi\n"
    assert json.loads(cli("result", done, "--json").stdout)["text"] == "None: hi"
    waiting = cli("enqueue", "hi").stdout.strip()
    found = cli("cancel", waiting, done, "nobody", code=2)
    assert set(found.stdout.splitlines()) == {f"{waiting} cancelled", f"{done} succeeded"}
    assert "nobody: no such job" in found.stderr
    assert "was cancelled" in cli("result", waiting, code=2).stderr
    assert "'nobody': no such job" in cli("result", "nobody", code=2).stderr


def test_an_empty_prompt_is_refused(cli: Cli, ledger: Ledger) -> None:
    assert "the prompt is empty" in cli("enqueue", "  ", code=2).output
    assert ledger.counts() == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "usage", "--by", "nobody"], "give some of tenant"),
        (["report", "usage", "--since", "soon"], "is no time"),
        (["report", "usage", "--since", "2026-02-01", "--until", "2026-01-01"], "is not before"),
        (["enqueue", "hi", "--temperature", "99"], "sampling_params.temperature"),
        (["enqueue", "hi", "--timeout", "3"], "is for --wait"),
        (["enqueue", "hi", "--webhook", "ftp://shop.example"], "webhook"),
        (["enqueue", ""], "prompt is empty|content"),
        (["batch", "submit", "/no/such/file"], "does not exist"),
        (["nonsense"], "No such command"),
    ],
)
def test_bad_arguments(cli: Cli, arguments: list[str], message: str) -> None:
    if arguments == ["enqueue", ""]:
        arguments = [*arguments, "--raw"]
    text = " ".join(cli(*arguments, code=2).stderr.replace("│", "").split())
    assert any(part in text for part in message.split("|"))
