"""`lorabatch report usage` and `report audit`."""

from __future__ import annotations

import sys
from datetime import datetime
from enum import StrEnum
from typing import Annotated

import typer

from lorabatch_producer.audit import audit as audit_ledger
from lorabatch_producer.client import Producer
from lorabatch_producer.console import printable, wide_console
from lorabatch_producer.usage import GROUPS, parse_time, usage_report
from lorabatch_producer.usage_format import usage_table, write_csv, write_json

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Usage, and whether it adds up.")


class Format(StrEnum):
    table = "table"
    csv = "csv"
    json = "json"


@app.command()
def usage(
    by: Annotated[str, typer.Option(help=f"Comma list of {', '.join(GROUPS)}.")] = "tenant,adapter",
    since: Annotated[str | None, typer.Option(help="UTC day or time, included.")] = None,
    until: Annotated[str | None, typer.Option(help="UTC day or time, not included.")] = None,
    form: Annotated[Format, typer.Option("--format")] = Format.table,
) -> None:
    """Jobs and tokens by tenant, adapter, version, model, batch or day."""
    names = [name.strip() for name in by.split(",") if name.strip()]
    first, last = _time(since, "--since"), _time(until, "--until")
    if first and last and first >= last:
        raise typer.BadParameter(f"{since} is not before --until {until}", param_hint="--since")
    with Producer() as producer:
        try:
            rows = usage_report(producer.ledger.engine, names, first, last)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--by") from None
    if form is Format.csv:
        write_csv(rows, names, sys.stdout)
    elif form is Format.json:
        write_json(rows, names, sys.stdout)
    else:
        wide_console().print(usage_table(rows, names))


def _time(text: str | None, option: str) -> datetime | None:
    if text is None:
        return None
    try:
        return parse_time(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


@app.command()
def audit() -> None:
    """Count the ledger again, job by job; print whatever does not add up."""
    found = 0
    with Producer() as producer:
        for difference in audit_ledger(producer.ledger.engine):
            found += 1
            typer.echo(printable(str(difference)))
        jobs = sum(producer.ledger.counts().values())
    typer.echo(f"{jobs} jobs, {found} differences", err=bool(found))
    raise typer.Exit(1 if found else 0)
