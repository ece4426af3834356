"""A queue for each base model: who may drain it, and that a job stays in its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from lorabatch import Job, Ledger, Result, Settings, batches
from lorabatch.batches import Batches
from lorabatch.dead import DeadLetters
from lorabatch.errors import AttemptsExhausted, IdempotencyConflict, SettingsError
from lorabatch.ledger import Outcome
from lorabatch.queues import Queues
from lorabatch.result import ErrorInfo
from lorabatch.tables import jobs
from lorabatch.tenants import Room
from lorabatch_producer import Producer, checks
from lorabatch_producer.batch import submit
from lorabatch_producer.bulk import BadLine
from lorabatch_producer.cli import app
from lorabatch_producer.output import errors_path, write_output
from tests.bad_inputs import chat, short
from tests.played_worker import run_queued


def queue_of(ledger: Ledger, job_id: str) -> str:
    with ledger.engine.connect() as connection:
        return str(connection.scalar(sa.select(jobs.c.queue).where(jobs.c.job_id == job_id)))


def test_a_worker_drains_where_producers_of_its_settings_send() -> None:
    assert Settings.load().consume == ("lorabatch", "celery")
    assert Settings.load(queue="second").consume == ("second",)
    assert Settings.load(queue="second", consume="a,b").consume == ("a", "b")


def test_a_queue_has_one_base_model(ledger: Ledger) -> None:
    queues = Queues(ledger.engine)
    queues.drain(["a", "b"], "acme/one")
    queues.drain(["b"], "acme/one")
    queues.drain(["c"], "acme/two")
    before = queues.list()
    wanted = (
        "'a' is for base model 'acme/one', queue 'b' is for base model 'acme/one', .* 'acme/two'.*"
        "`lorabatch queues set a acme/two` and `lorabatch queues set b acme/two`"
    )
    for asked in (queues.check, queues.drain):
        with pytest.raises(SettingsError, match=wanted):
            asked(["b", "new", "c", "a"], "acme/two")
    queues.check(["c", "new"], "acme/two")
    assert queues.list() == before, "all of them or none"
    queues.drain(["b"], "/models/one", aliases=("acme/one",))
    queues.set("b", "acme/two")
    queues.drain(["b", "c"], "acme/two")
    assert queues.list() == {"a": "acme/one", "b": "acme/two", "c": "acme/two"}


def test_the_same_key_in_another_queue_is_a_conflict(ledger: Ledger) -> None:
    job = Job(job_id="j", tenant="acme", prompt="hi", idempotency_key="k")
    again = job.model_copy(update={"job_id": "other"})
    ledger.accept([job], queue="second")
    assert ledger.accept([again], queue="second") == {"other": "j"}
    with pytest.raises(IdempotencyConflict, match="'j' in queue 'second', and this is for 'lora"):
        ledger.accept([again])
    assert ledger.accept([again], as_sent=True) == {"other": "j"}, "its message came from there"


def test_what_runs_again_stays_in_its_queue(ledger: Ledger) -> None:
    made = [Job(job_id=name, tenant="acme", prompt="hi") for name in ("dead", "cancelled")]
    ledger.accept(made, queue="second")
    ledger.cancel(["cancelled"])
    claim = ledger.claim(["dead"], "w", 9.0)["dead"]
    error = ErrorInfo(code=AttemptsExhausted.code, message="given up")
    failed = Result(
        job_id="dead", tenant="acme", adapter_id=None, state="failed", error=error, attempt=1
    )
    ledger.record([Outcome(claim, failed)])
    new = DeadLetters(ledger.engine).retry(["dead"]).jobs
    new |= Batches(ledger.engine).run_again(["cancelled"]).jobs
    assert new.keys() == {"dead", "cancelled"}
    assert [queue_of(ledger, job_id) for job_id in new.values()] == ["second", "second"]


def test_what_runs_again_locks_tenants_in_one_order(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queue by queue, two calls could each hold the tenant that the other waits for."""
    asked: list[set[str]] = []

    class Asked(Room):
        def __init__(self, connection: sa.Connection, of: set[str], queue: str) -> None:
            asked.append(set(of))
            super().__init__(connection, of, queue)

    monkeypatch.setattr(batches, "Room", Asked)
    made = {queue: Job(tenant=f"of-{queue}", prompt="hi") for queue in ("a", "b")}
    for queue, job in made.items():
        ledger.accept([job], queue=queue)
    ids = [job.job_id for job in made.values()]
    ledger.cancel(ids)
    assert Batches(ledger.engine).run_again(ids).jobs.keys() == {*ids}
    assert asked == [{"of-a", "of-b"}] * 2


def test_a_file_is_for_the_base_model_of_its_queue(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    line = '{"custom_id": "x", "method": "POST", "url": "/v1/chat/completions", "body": '
    chat = '"messages": [{"role": "user", "content": "hi"}]}}'
    file.write_text(f'{line}{{"model": "acme/two", {chat}\n')
    with Producer(settings.model_copy(update={"queue": "second"})) as producer:
        Queues(producer.ledger.engine).drain(["second"], "acme/two")
        batch_id = submit(producer, file).batch_id
        with producer.ledger.engine.connect() as connection:
            mine = jobs.c.batch_id == batch_id
            rows = connection.execute(sa.select(jobs.c.adapter_id, jobs.c.queue).where(mine)).all()
        assert [tuple(row) for row in rows] == [(None, "second")]
    with (
        Producer(settings) as producer,
        pytest.raises(IdempotencyConflict, match="another queue, LORABATCH_BASE_MODEL"),
    ):
        submit(producer, file)


def test_a_file_means_what_it_meant_when_it_was_submitted(
    settings: Settings, tmp_path: Path
) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_bytes(chat(model="/models/other"))
    with Producer(settings.model_copy(update={"queue": "second"})) as producer:
        bad: list[BadLine] = []
        assert submit(producer, file, on_bad=bad.append).accepted == 0
        assert "name, here HuggingFaceTB/" in bad[0].message, bad[0].message
        queues = Queues(producer.ledger.engine)
        queues.drain(["second"], "/models/other")
        batch_id = submit(producer, file).batch_id
        status = producer.status(batch_id)
        assert (status.queued, status.rejected_lines) == (1, 0)
        run_queued(producer.ledger)
        queues.set("second", "/models/newer")
        written = write_output(producer.ledger, batch_id, file, out)
        assert (written.succeeded, written.bad) == (1, 0)
        (line,) = map(json.loads, out.read_text().splitlines())
        assert line["response"]["body"]["model"] == "/models/other"


def test_output_knows_a_line_that_was_refused(settings: Settings, tmp_path: Path) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_bytes(chat(model="/models/other") + b"\n" + short())
    with Producer(settings) as producer:
        batch_id = submit(producer, file).batch_id
        run_queued(producer.ledger)
        written = write_output(producer.ledger, batch_id, file, out)
    assert (written.succeeded, written.not_finished, written.bad) == (1, 0, 1)
    refused = json.loads(errors_path(out).read_text())
    assert (refused["line"], refused["code"]) == (1, "not_accepted")


def test_the_doctor_looks_at_queues() -> None:
    def pool(queue: str, model: str) -> dict[str, object]:
        return {"queues": [queue], "base_model": model}

    def said(found: dict[str, dict[str, object]]) -> tuple[str, str]:
        check = checks._workers(found, "a")
        return check.state, check.text

    assert said({"w": pool("a", "one")}) == ("ok", "w (a: one)")
    assert said({"old": {}}) == ("ok", "old")
    assert said({"w": pool("b", "one")}) == (
        "warning",
        "w (b: one); none drains 'a', where jobs are sent from here (LORABATCH_QUEUE)",
    )
    state, text = said({"v": pool("a", "one"), "w": pool("a", "two")})
    assert (state, text.partition("; ")[2]) == (
        "warning",
        "queue 'a' is drained with one and two: stop one of them",
    )


def test_the_command(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORABATCH_HOME", str(home))

    def run(*words: str) -> str:
        return CliRunner().invoke(app, ["queues", *words]).output

    assert run("list") == "none: no worker has run\n"
    assert run("set", "b", "acme/two") == "b: acme/two\n" == run("list")
    assert run("list", "--json") == '{"b": "acme/two"}\n'
    assert "queue '-': wanted letters" in run("set", "--", "-", "x")
