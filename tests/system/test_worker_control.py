"""Cancelling, revoking, time limits, inspection, and tasks that are not ours."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError
from shop import Shop, wait_until
from typer.testing import CliRunner

from lorabatch import Job
from lorabatch.errors import JobFailed
from lorabatch.queue import TASK_NAME
from lorabatch_producer import Producer, services
from lorabatch_producer.cli import app

WAIT_S = 30
LONG = {"max_new_tokens": 20_000}


def start_long(shop: Shop, count: int = 1) -> list[Any]:
    """Plain clients' jobs that run for minutes, all of them started."""
    sent = [shop.generate(prompt=f"long {i}", sampling_params=LONG) for i in range(count)]

    def active() -> bool:
        replies = shop.client.control.inspect(timeout=1).active() or {}
        return {r.id for r in sent} <= {t["id"] for tasks in replies.values() for t in tasks}

    wait_until("long jobs active", active)
    return sent


def state(shop: Shop, job_id: str) -> str | None:
    return shop.ledger.states([job_id]).get(job_id)


def wait_cancelled(shop: Shop, job_id: str) -> None:
    wait_until("cancelled", lambda: state(shop, job_id) == "cancelled")


def test_a_job_cancelled_while_queued_never_runs(running: Shop) -> None:
    job = Job(prompt="never")
    running.ledger.accept([job])
    running.ledger.cancel([job.job_id])
    running.send([job])
    running.wait_broker_empty()
    assert state(running, job.job_id) == "cancelled"
    assert running.executions()[job.job_id] == 0


def test_a_running_job_is_cancelled_through_the_ledger(running: Shop) -> None:
    (sent,) = start_long(running)
    assert running.ledger.cancel([sent.id]) == {sent.id: "running"}
    wait_cancelled(running, sent.id)
    with pytest.raises(TaskRevokedError):
        sent.get(timeout=WAIT_S)
    running.wait_broker_empty()


def test_a_client_that_cancels_does_not_wait_for_the_next_renewal(shop: Shop) -> None:
    shop.start(LORABATCH_LEASE_S="6000").wait_ready()
    (sent,) = start_long(shop)
    with Producer(shop.settings) as producer:
        assert producer.cancel(sent.id) == {sent.id: "running"}
        wait_cancelled(shop, sent.id)


def test_revoke_with_terminate_cancels_a_running_job_in_the_ledger(running: Shop) -> None:
    (sent,) = start_long(running)
    running.client.control.revoke(sent.id, terminate=True)
    wait_cancelled(running, sent.id)
    with pytest.raises(TaskRevokedError):
        sent.get(timeout=WAIT_S)
    running.wait_broker_empty()


def test_revoke_cancels_a_job_that_waits_and_leaves_the_running(running: Shop) -> None:
    slots = int(running.env["LORABATCH_MAX_SEQS"])
    sent = start_long(running, slots)
    waiting = running.generate(prompt="waits", sampling_params=LONG)
    wait_until("claimed", lambda: state(running, waiting.id) == "running")
    running.client.control.revoke(waiting.id)
    wait_cancelled(running, waiting.id)
    assert {state(running, r.id) for r in sent} == {"running"}
    running.client.control.revoke([r.id for r in sent], terminate=True)
    for result in sent:
        wait_cancelled(running, result.id)
    running.wait_broker_empty()


def test_a_job_revoked_before_it_is_delivered_is_cancelled_in_the_ledger(running: Shop) -> None:
    job = Job(prompt="too late")
    running.client.control.revoke(job.job_id)
    wait_until(
        "revocation known",
        lambda: (
            job.job_id in str((running.client.control.inspect(timeout=1).revoked() or {}).values())
        ),
    )
    running.ledger.accept([job])
    running.send([job])
    wait_cancelled(running, job.job_id)
    running.wait_broker_empty()
    assert running.executions()[job.job_id] == 0


def test_an_expired_message_is_a_cancelled_job(running: Shop) -> None:
    past = datetime.now(UTC) - timedelta(hours=1)
    sent = running.client.send_task(TASK_NAME, kwargs={"prompt": "stale"}, expires=past)
    wait_cancelled(running, sent.id)
    with pytest.raises(TaskRevokedError):
        sent.get(timeout=WAIT_S)
    running.wait_broker_empty()
    assert running.executions()[sent.id] == 0


def test_a_job_that_expires_while_it_waits_is_cancelled(running: Shop) -> None:
    slots = int(running.env["LORABATCH_MAX_SEQS"])
    before = start_long(running, slots)
    sent = running.client.send_task(TASK_NAME, kwargs={"prompt": "stale"}, expires=2)
    patient = running.client.send_task(TASK_NAME, kwargs={"prompt": "patient"}, expires=3600)
    wait_until("claimed", lambda: state(running, sent.id) == "running")
    wait_cancelled(running, sent.id)
    assert {state(running, r.id) for r in [*before, patient]} == {"running"}
    running.client.control.revoke([r.id for r in before], terminate=True)
    assert patient.get(timeout=WAIT_S)["state"] == "succeeded"
    with pytest.raises(TaskRevokedError):
        sent.get(timeout=WAIT_S)
    running.wait_broker_empty()


def test_a_countdown_runs_later(running: Shop) -> None:
    sent = running.client.send_task(TASK_NAME, kwargs={"prompt": "later"}, countdown=1)
    assert sent.get(timeout=WAIT_S)["state"] == "succeeded"
    running.wait_broker_empty()


@pytest.mark.parametrize("limit", [{"time_limit": 1}, {"soft_time_limit": 1}])
def test_a_time_limit_is_a_failed_job(running: Shop, limit: dict[str, int]) -> None:
    sent = running.client.send_task(
        TASK_NAME, kwargs={"prompt": "slow", "sampling_params": LONG}, **limit
    )
    with pytest.raises(JobFailed, match="time_limit"):
        sent.get(timeout=WAIT_S)
    error = running.ledger.results([sent.id])[sent.id].error
    assert error is not None
    assert error.code == "time_limit"
    running.wait_broker_empty()


def test_ping_and_inspect_answer_and_show_no_prompt(running: Shop) -> None:
    (sent,) = start_long(running)
    inspect = running.client.control.inspect(timeout=1)
    assert list(inspect.ping().values()) == [{"ok": "pong"}]
    assert "long 0" not in str(inspect.active())
    assert "long 0" not in str(inspect.query_task(sent.id))
    (stats,) = inspect.stats().values()
    assert stats["pool"]["running"] == 1
    assert stats["pool"]["live"] == 1
    running.client.control.revoke(sent.id, terminate=True)
    wait_cancelled(running, sent.id)


def test_status_shows_how_full_the_steps_were(
    running: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in running.env.items():
        monkeypatch.setenv(name, value)
    slots = int(running.env["LORABATCH_MAX_SEQS"])
    sent = start_long(running, slots)
    (stats,) = running.client.control.inspect(timeout=1).stats().values()
    pool = stats["pool"]
    assert pool["occupancy"] == round(pool["step_seqs"] / pool["steps"] / slots, 3)

    shown = CliRunner().invoke(app, ["status"]).stdout
    found = re.search(r"^workers  \S+@\S+ \(occupancy (\d+)%\)$", shown, re.MULTILINE)
    assert found is not None, shown
    assert round(100 * pool["occupancy"]) <= int(found[1]) <= 100  # more of them full since then
    running.client.control.revoke([r.id for r in sent], terminate=True)
    for result in sent:
        with pytest.raises(TaskRevokedError):
            result.get(timeout=WAIT_S)
    running.wait_broker_empty()


def test_why_says_where_a_jobs_adapter_is(running: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in running.env.items():
        monkeypatch.setenv(name, value)
    slots = int(running.env["LORABATCH_MAX_SEQS"])
    sent = start_long(running, slots)
    (job,) = running.accept(1)
    shown = CliRunner().invoke(app, ["why", job.job_id]).stdout
    found = re.search(
        r"^adapter 'adapter-0' is in memory of (lorabatch-\d+@\S+)$", shown, re.MULTILINE
    )
    assert found is not None, shown
    unheard = services._asked(running.client, {"no": "such argument"}, [found[1]])
    assert unheard == {}, "an error is no answer"
    running.client.control.revoke([r.id for r in sent], terminate=True)
    for result in sent:
        wait_cancelled(running, result.id)
    running.wait_broker_empty()


def test_another_task_of_the_app_runs_on_a_thread(running: Shop) -> None:
    assert running.client.send_task("tests.add", (2, 3)).get(timeout=WAIT_S) == 5
    failing = running.client.send_task("tests.add", ("a", 3))
    with pytest.raises(TypeError):
        failing.get(timeout=WAIT_S)
    running.wait_broker_empty()
