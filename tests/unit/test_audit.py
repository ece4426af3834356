"""The audit against every kind of tampering."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from lorabatch import Job, Ledger
from lorabatch.ledger import Outcome
from lorabatch.tables import jobs, results, usage_events
from lorabatch_producer.audit import audit
from tests.played_worker import succeeds


def found(ledger: Ledger) -> set[tuple[str, str]]:
    return {(difference.subject, difference.what) for difference in audit(ledger.engine)}


def test_an_untouched_ledger_has_no_differences(ledger: Ledger, filled: Ledger) -> None:
    assert list(audit(filled.engine)) == []


def test_an_empty_ledger_has_none(ledger: Ledger) -> None:
    assert list(audit(ledger.engine)) == []


def test_who_reads_it_slowly_holds_no_transaction(ledger: Ledger, filled: Ledger) -> None:
    with ledger.engine.begin() as connection:
        connection.execute(sa.delete(results))
    pool = ledger.engine.pool
    assert isinstance(pool, sa.QueuePool)
    assert {pool.checkedout() for _ in audit(ledger.engine)} == {0}


def of(table: sa.Table, job_id: str) -> sa.ColumnElement[bool]:
    return table.c.job_id == job_id


def change(table: sa.Table, job_id: str, **values: object) -> sa.Executable:
    return sa.update(table).where(of(table, job_id)).values(**values)


def event(job_id: str, **values: object) -> sa.Executable:
    base: dict[str, object] = {c.name: 0 for c in usage_events.c if not c.nullable}
    del base["usage_event_id"]
    named = {"event_key": "forged", "job_id": job_id, "tenant": "acme", "kind": "generation"}
    return usage_events.insert().values({**base, **named, "billable": False, **values})


SUMS = {"sum of input_tokens", "sum of output_tokens", "sum of billable_tokens"}
ACME = {("tenant acme", what) for what in SUMS}
TAMPERINGS: list[tuple[str, sa.Executable, set[tuple[str, str]]]] = [
    (
        "a usage row is deleted",
        sa.delete(usage_events).where(of(usage_events, "a2")),
        {("a2", "usage events of a succeeded job"), *ACME},
    ),
    (
        "a usage row is doubled",
        event("a4", input_tokens=2, output_tokens=1, billable=True, base_model="tiny"),
        {("a4", "usage events of a succeeded job"), *ACME},
    ),
    (
        "a result is deleted",
        sa.delete(results).where(of(results, "a2")),
        {("a2", "results of a succeeded job"), *ACME},
    ),
    (
        "billed input is raised",
        change(usage_events, "a2", input_tokens=21),
        {
            ("a2", "usage input_tokens"),
            ("tenant acme", "sum of input_tokens"),
            ("tenant acme", "sum of billable_tokens"),
        },
    ),
    (
        "billed output is lowered",
        change(usage_events, "a2", output_tokens=4),
        {
            ("a2", "usage output_tokens"),
            ("tenant acme", "sum of output_tokens"),
            ("tenant acme", "sum of billable_tokens"),
        },
    ),
    (
        "cached tokens are hidden",
        change(usage_events, "a1", cached_tokens=0),
        {("a1", "usage cached_tokens"), ("tenant acme", "sum of cached_tokens")},
    ),
    (
        "stored tokens are changed",
        change(results, "a2", token_ids=[1]),
        {
            ("a2", "usage output_tokens"),
            ("tenant acme", "sum of output_tokens"),
            ("tenant acme", "sum of billable_tokens"),
        },
    ),
    (
        "another tenant pays",
        change(usage_events, "b1", tenant="acme"),
        {("b1", "usage tenant")}
        | {
            (f"tenant {tenant}", what)
            for tenant in ("acme", "beta")
            for what in {*SUMS, "sum of cached_tokens"}
        },
    ),
    ("another adapter", change(usage_events, "a2", adapter_id="x"), {("a2", "usage adapter_id")}),
    ("no adapter", change(usage_events, "a2", adapter_id=None), {("a2", "usage adapter_id")}),
    (
        "another version",
        change(usage_events, "a2", adapter_version="v9"),
        {("a2", "usage adapter_version")},
    ),
    ("another model", change(usage_events, "a2", base_model="x"), {("a2", "usage base_model")}),
    ("another batch", change(usage_events, "a2", batch_id=None), {("a2", "usage batch_id")}),
    ("another kind", change(usage_events, "a2", kind="gift"), {("a2", "usage kind")}),
    (
        "a failed job is billed",
        change(usage_events, "a3", billable=True),
        {("a3", "usage billable"), ("tenant acme", "sum of billable_tokens")},
    ),
    (
        "a good job is given away",
        change(usage_events, "a2", billable=False),
        {("a2", "usage billable"), ("tenant acme", "sum of billable_tokens")},
    ),
    (
        "an open job is billed",
        event("open"),
        {("open", "usage events of a queued job")},
    ),
    (
        "an open job has a result",
        results.insert().values(
            job_id="runs",
            state="succeeded",
            token_ids=[],
            prompt_tokens=0,
            cached_tokens=0,
            attempt=1,
            recorded_us=0,
        ),
        {("runs", "results of a running job")},
    ),
    (
        "a job is opened again",
        change(jobs, "b2", state="queued"),
        {("b2", "results of a queued job"), ("b2", "usage events of a queued job")},
    ),
    (
        "a failed job is called a success",
        change(jobs, "a3", state="succeeded"),
        {
            ("a3", "state of the result"),
            ("a3", "usage billable"),
            ("tenant acme", "sum of billable_tokens"),
        },
    ),
    (
        "usage of a job that never was",
        event("ghost", tenant="ghosts", input_tokens=5),
        {("ghost", "usage events of no job"), ("tenant ghosts", "sum of input_tokens")},
    ),
]


@pytest.mark.parametrize(
    ("tampering", "wanted"), [row[1:] for row in TAMPERINGS], ids=[row[0] for row in TAMPERINGS]
)
def test_the_audit_finds(
    filled: Ledger, tampering: sa.Executable, wanted: set[tuple[str, str]]
) -> None:
    with filled.engine.begin() as connection:
        connection.execute(tampering)
    assert found(filled) == wanted


def test_a_difference_says_what_was_seen_and_wanted(filled: Ledger) -> None:
    with filled.engine.begin() as connection:
        connection.execute(change(usage_events, "a2", cached_tokens=9))
    first, *_ = audit(filled.engine)
    assert str(first) == "a2: usage cached_tokens: seen 9, wanted 0"


def test_the_audit_goes_through_many_pages(ledger: Ledger) -> None:
    ids = [f"j{i:04}" for i in range(1_100)]
    ledger.accept([Job(job_id=job_id, prompt="p") for job_id in ids])
    claims = ledger.claim(ids, "me", 60)
    ledger.record([Outcome(claim, succeeds(claim)) for claim in claims.values()])
    assert found(ledger) == set()
    with ledger.engine.begin() as connection:
        connection.execute(change(usage_events, "j1099", adapter_id="x"))
        connection.execute(change(usage_events, "j0000", adapter_id="x"))
    assert [d.subject for d in audit(ledger.engine)] == ["j0000", "j1099"]
