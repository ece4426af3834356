"""The usage report by hand-computed figures, as rows, table, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from datetime import date, timedelta, timezone
from typing import Any

import pytest
from rich.console import Console

from lorabatch import Ledger
from lorabatch_producer.usage import FIGURES, UsageRow, parse_time, total, usage_report
from lorabatch_producer.usage_format import safe_cell, usage_table, write_csv, write_json
from tests.ended_jobs import DAY_1, DAY_2


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
