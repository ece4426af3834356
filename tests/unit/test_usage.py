"""The usage report by hand-computed figures, and the audit against every kind of tampering."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa
from rich.console import Console

from lorabatch import ErrorInfo, Job, Ledger, Usage
from lorabatch.ledger import Claim, Outcome
from lorabatch.tables import jobs, results, usage_events
from lorabatch_producer.audit import audit
from lorabatch_producer.usage import FIGURES, UsageRow, parse_time, total, usage_report
from lorabatch_producer.usage_format import safe_cell, usage_table, write_csv, write_json
from tests.played_worker import succeeds

DAY_1 = datetime(2026, 1, 30, tzinfo=UTC)
DAY_2 = datetime(2026, 1, 31, tzinfo=UTC)

# job id, tenant, adapter, batch, ends as, prompt, cached, output tokens, when
JOBS: list[tuple[str, str, str | None, str | None, str, int, int, int, datetime]] = [
    ("a1", "acme", "sql", "b1", "succeeded", 10, 4, 3, DAY_1),
    ("a2", "acme", "sql", "b1", "succeeded", 20, 0, 5, DAY_1 + timedelta(hours=23)),
    ("a3", "acme", "sql", None, "failed", 7, 0, 1, DAY_2),
    ("a4", "acme", None, None, "succeeded", 2, 0, 1, DAY_2),
    ("b1", "beta", "sql", None, "succeeded", 100, 50, 8, DAY_2 - timedelta(microseconds=1)),
    ("b2", "beta", "pirate", None, "cancelled", 0, 0, 0, DAY_2 + timedelta(hours=1)),
]


def ended(claim: Claim) -> Outcome:
    _, _, adapter, _, state, prompt, cached, output, _ = next(
        row for row in JOBS if row[0] == claim.job.job_id
    )
    good = state == "succeeded"
    result = succeeds(
        claim,
        state=state,
        text="x" if good else None,
        token_ids=tuple(range(output)),
        usage=Usage(prompt_tokens=prompt, cached_tokens=cached, output_tokens=output),
        error=None if good else ErrorInfo(code="x", message="x"),
        adapter_version=f"{adapter}-v1" if adapter else None,
    )
    return Outcome(claim, result)


@pytest.fixture
def filled(ledger: Ledger) -> Ledger:
    ledger.accept(
        [
            Job(job_id=row[0], tenant=row[1], adapter_id=row[2], batch_id=row[3], prompt="p")
            for row in JOBS
        ]
        + [Job(job_id="open", tenant="acme", prompt="p"), Job(job_id="runs", prompt="p")]
    )
    claims = ledger.claim([row[0] for row in JOBS], "me", 60)
    ledger.claim(["runs"], "me", 60)
    ledger.record([ended(claim) for claim in claims.values()])
    with ledger.engine.begin() as connection:
        for job_id, *_, when in JOBS:
            micros = round(when.timestamp() * 1e6)
            query = sa.update(usage_events).where(usage_events.c.job_id == job_id)
            connection.execute(query.values(occurred_us=micros))
    return ledger


def report(ledger: Ledger, *by: str, **when: Any) -> dict[tuple[str | None, ...], tuple[int, ...]]:
    rows = usage_report(ledger.engine, by, **when)
    assert [row.group for row in rows] == [row.group for row in rows if len(row.group) == len(by)]
    return {row.group: row.figures for row in rows}


# jobs, succeeded, failed, cancelled, input, cached, output, total, billable
ALL = (6, 4, 1, 1, 139, 54, 18, 157, 149)


def test_by_tenant_and_adapter(filled: Ledger) -> None:
    assert report(filled, "tenant", "adapter") == {
        ("acme", None): (1, 1, 0, 0, 2, 0, 1, 3, 3),
        ("acme", "sql"): (3, 2, 1, 0, 37, 4, 9, 46, 38),
        ("beta", "pirate"): (1, 0, 0, 1, 0, 0, 0, 0, 0),
        ("beta", "sql"): (1, 1, 0, 0, 100, 50, 8, 108, 108),
    }


def test_by_everything_else(filled: Ledger) -> None:
    assert report(filled, "tenant") == {
        ("acme",): (4, 3, 1, 0, 39, 4, 10, 49, 41),
        ("beta",): (2, 1, 0, 1, 100, 50, 8, 108, 108),
    }
    assert report(filled, "batch") == {
        (None,): (4, 2, 1, 1, 109, 50, 10, 119, 111),
        ("b1",): (2, 2, 0, 0, 30, 4, 8, 38, 38),
    }
    assert report(filled, "version", "model") == {
        (None, "tiny"): (1, 1, 0, 0, 2, 0, 1, 3, 3),
        ("pirate-v1", "tiny"): (1, 0, 0, 1, 0, 0, 0, 0, 0),
        ("sql-v1", "tiny"): (4, 3, 1, 0, 137, 54, 17, 154, 146),
    }
    assert report(filled, "day") == {
        ("2026-01-30",): (3, 3, 0, 0, 130, 54, 16, 146, 146),
        ("2026-01-31",): (3, 1, 1, 1, 9, 0, 2, 11, 3),
    }
    assert set(report(filled, "day", "tenant", "adapter", "batch", "version", "model"))


def test_every_grouping_sums_to_the_same(filled: Ledger) -> None:
    for by in ("tenant", "adapter", "version", "model", "batch", "day"):
        assert total(usage_report(filled.engine, [by])).figures == ALL
    assert total([]).figures == (0,) * len(FIGURES)


@pytest.mark.parametrize(
    ("since", "until", "count"),
    [
        (DAY_1, DAY_2, 3),
        (DAY_2, None, 3),
        (None, DAY_1, 0),
        (DAY_1, DAY_1 + timedelta(microseconds=1), 1),
        (DAY_1 + timedelta(microseconds=1), DAY_2 - timedelta(microseconds=1), 1),
        (DAY_2 - timedelta(microseconds=1), DAY_2, 1),
        (date(2026, 1, 31), date(2026, 2, 1), 3),
        (DAY_2.astimezone(timezone(timedelta(hours=5))), None, 3),
        (DAY_2.replace(tzinfo=None), None, 3),
    ],
)
def test_since_is_included_and_until_is_not(
    filled: Ledger, since: date | None, until: date | None, count: int
) -> None:
    assert total(usage_report(filled.engine, ["tenant"], since, until)).jobs == count


def test_times() -> None:
    assert parse_time("2026-01-31") == DAY_2
    assert parse_time("2026-01-31T05:30:00+05:30") == DAY_2
    assert parse_time("2026-01-31T00:00:00Z") == DAY_2
    for bad in ("", "yesterday", "2026-13-01", "31.1.2026"):
        with pytest.raises(ValueError, match="is no time"):
            parse_time(bad)


@pytest.mark.parametrize("by", [[], ["nobody"], ["tenant", "tenant"], ["tenant; DROP TABLE jobs"]])
def test_groups_that_are_none(ledger: Ledger, by: Sequence[str]) -> None:
    with pytest.raises(ValueError, match="give some of tenant, adapter, version, model, batch"):
        usage_report(ledger.engine, by)


ROWS = [UsageRow(("=cmd()", "a\nb"), *range(1, 10)), UsageRow(("-1+1", None), *range(1, 10))]


def test_csv_has_no_formulas_no_line_ends_and_no_totals() -> None:
    file = io.StringIO()
    write_csv(ROWS, ["tenant", "adapter"], file)
    head, *lines = csv.reader(file.getvalue().splitlines())
    assert head == ["tenant", "adapter", *FIGURES]
    figures = [str(i) for i in range(1, 10)]
    assert lines == [["'=cmd()", "a\\nb", *figures], ["'-1+1", "", *figures]]


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "=a\nb"])
def test_formula_cells(text: str) -> None:
    cell = safe_cell(text)
    assert cell[0] not in "=+-@\t\r"
    assert "\n" not in cell
    assert safe_cell("plain=1") == "plain=1"
    assert safe_cell(None) == ""


def test_json() -> None:
    file = io.StringIO()
    write_json(ROWS[1:], ["tenant", "adapter"], file)
    assert json.loads(file.getvalue()) == [
        {"tenant": "-1+1", "adapter": None, **dict(zip(FIGURES, range(1, 10), strict=True))}
    ]


def test_the_table_has_totals() -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(usage_table(ROWS, ["tenant", "adapter"]))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "(base model)" in lines[3]
    assert lines[-1].split("│")[0].strip() == "total"
    assert [cell.strip() for cell in lines[-1].split("│")[2:]] == [str(2 * i) for i in range(1, 10)]


# -- the audit --------------------------------------------------------------------------------


def found(ledger: Ledger) -> set[tuple[str, str]]:
    return {(difference.subject, difference.what) for difference in audit(ledger.engine)}


def test_an_untouched_ledger_has_no_differences(ledger: Ledger, filled: Ledger) -> None:
    assert list(audit(filled.engine)) == []


def test_an_empty_ledger_has_none(ledger: Ledger) -> None:
    assert list(audit(ledger.engine)) == []


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
