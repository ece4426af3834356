"""`lorabatch tenants create`, `list`, `set`, `forget`, `revoke`: what each tenant may have.

Database errors pass through.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import sqlalchemy as sa
import typer
from rich.table import Table
from rich.text import Text

from lorabatch import Settings
from lorabatch.database import open_database
from lorabatch.fields import is_identifier
from lorabatch.keys import Keys
from lorabatch.tenants import ALL, EACH, Limits, Tenants
from lorabatch_producer.console import printable, wide_console

__all__ = ["app"]

COLUMNS = ("tenant", "weight", "max running", "max queued", "requests/min", "tokens/min")
SHOWN_NAMES = {EACH: "(each other)", ALL: "(all together)"}
app = typer.Typer(no_args_is_help=True, help="Tenants: shares and limits.")
Name = Annotated[str | None, typer.Argument(metavar="NAME", show_default=False)]
Whose = Annotated[str, typer.Argument(metavar="NAME", show_default=False)]
Each = Annotated[bool, typer.Option("--each", help="Every tenant that says nothing of its own.")]
All = Annotated[bool, typer.Option("--all", help="All tenants together; --max-queued alone.")]
NO_LIMIT = -1
TOKENS = "Tokens that these may take: all that they ask for, and one for 4 characters of prompt."
MOST = 2**31 - 1  # what the column takes


def _most(text: str) -> int:
    if text == "none":
        return NO_LIMIT
    if not (text.isascii() and text.isdecimal()) or int(text) > MOST:
        raise typer.BadParameter(f"{printable(text[:80])!r}: wanted 0 to {MOST:,}, or none")
    return int(text)


def _limit(what: str) -> Any:
    more = " none: no limit of its own, that of --each holds."
    return typer.Option(parser=_most, metavar="N|none", help=what + more)


@app.command()
def create(name: Whose) -> None:
    """Note a tenant. It needs none of it: whoever a job names is one; but so it is listed."""
    tenant = _which(name, each=False, together=False)
    with _opened() as tenants:
        if any(limits.tenant == tenant for limits in tenants.list()):
            raise typer.BadParameter(
                f"{tenant!r} is there already; `lorabatch tenants set {tenant}` changes it",
                param_hint="NAME",
            )
        said = _before(tenants, tenant)
        tenants.set(said)
        others = _others(tenants)
    typer.echo(_sentence(said, others))
    typer.echo(f"a key for it: lorabatch keys create --tenant {tenant}", err=True)


@app.command("list")
def show(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Those that something was said of."""
    with _opened() as tenants:
        found = tenants.list()
    if as_json:
        for limits in found:
            typer.echo(json.dumps(dataclasses.asdict(limits)))
        return
    table = Table(show_edge=False, pad_edge=False)
    for place, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if place else "left", overflow="fold")
    for limits in found:
        table.add_row(*map(Text, _cells(limits)))
    wide_console().print(table)
    if not found:
        typer.echo("none: every tenant has weight 1 and no limit")


@app.command("set")
def set_limits(
    name: Name = None,
    each: Each = False,
    together: All = False,
    weight: Annotated[
        float | None, typer.Option(help="Twice as much gets twice the tokens.")
    ] = None,
    max_running: Annotated[
        int | None, _limit("Jobs under way at once; 0: what waits goes on waiting.")
    ] = None,
    max_queued: Annotated[
        int | None, _limit("Jobs that may wait; 0: whatever comes is refused.")
    ] = None,
    requests_per_minute: Annotated[
        int | None, _limit("Jobs that the HTTP API accepts in a minute, batches aside.")
    ] = None,
    tokens_per_minute: Annotated[int | None, _limit(TOKENS)] = None,
) -> None:
    """Say what a tenant may have. What is left out stays as it was."""
    tenant = _which(name, each, together)
    most = {
        name: None if value == NO_LIMIT else value
        for name, value in (
            ("max_running", max_running),
            ("max_queued", max_queued),
            ("requests_per_minute", requests_per_minute),
            ("tokens_per_minute", tokens_per_minute),
        )
        if value is not None
    }
    _check(tenant, weight, most)
    with _opened() as tenants:
        said = _changed(_before(tenants, tenant), weight, most)
        tenants.set(said)
        others = _others(tenants)
    typer.echo(_sentence(said, others))


@app.command()
def forget(name: Name = None, each: Each = False, together: All = False) -> None:
    """Take back all that was said of a tenant; its jobs stay."""
    tenant = _which(name, each, together)
    with _opened() as tenants:
        known = tenants.forget(tenant)
    typer.echo(f"{_shown(tenant)}: " + ("forgotten" if known else "nothing was said of it"))


@app.command()
def revoke(name: Whose) -> None:
    """End all keys of a tenant. Its jobs go on, and what was said of it stays."""
    tenant = _which(name, each=False, together=False)
    with _database() as engine:
        keys = Keys(engine)
        ended = [keys.revoke(key.key_id) for key in keys.list(tenant) if key.valid]
    typer.echo(f"{tenant}: {len(ended)} keys revoked")


@contextlib.contextmanager
def _database() -> Iterator[sa.Engine]:
    engine = open_database(Settings.load())
    try:
        yield engine
    finally:
        engine.dispose()


@contextlib.contextmanager
def _opened() -> Iterator[Tenants]:
    with _database() as engine:
        yield Tenants(engine)


def _which(name: str | None, each: bool, together: bool) -> str:
    if (name is not None) + each + together != 1:
        raise typer.BadParameter("give NAME, --each or --all, one of them")
    if name is None:
        return EACH if each else ALL
    if not is_identifier(name):
        raise typer.BadParameter(
            f"{printable(name[:80])!r}: wanted letters, digits and _ . : @ -, the first one a "
            "letter or digit, at most 64",
            param_hint="NAME",
        )
    return name


def _check(tenant: str, weight: float | None, most: Mapping[str, int | None]) -> None:
    if weight is not None and not (weight > 0 and math.isfinite(weight)):
        raise typer.BadParameter(f"{weight:g} is no number above 0", param_hint="--weight")
    if tenant == ALL and (weight is not None or set(most) != {"max_queued"}):
        raise typer.BadParameter("all tenants together have --max-queued, and nothing else")
    if weight is None and not most:
        raise typer.BadParameter(
            "give --weight, --max-running or --max-queued, --requests-per-minute or "
            "--tokens-per-minute"
        )


def _others(tenants: Tenants) -> Limits | None:
    """What holds for who says nothing of its own."""
    return {limits.tenant: limits for limits in tenants.list()}.get(EACH)


def _before(tenants: Tenants, tenant: str) -> Limits:
    """What was said of it; at first the weight that it has had as one of the others."""
    known = {limits.tenant: limits for limits in tenants.list()}
    weight = known[EACH].weight if EACH in known and tenant != ALL else 1.0
    return known.get(tenant, Limits(tenant, weight))


def _changed(before: Limits, weight: float | None, most: Mapping[str, Any]) -> Limits:
    weight = before.weight if weight is None else weight
    return dataclasses.replace(before, weight=weight, **most)


def _shown(tenant: str) -> str:
    return SHOWN_NAMES.get(tenant, tenant)


def _cells(limits: Limits) -> tuple[str, ...]:
    weight = "-" if limits.tenant == ALL else f"{limits.weight:g}"
    most = (
        *(limits.max_running, limits.max_queued),
        *(limits.requests_per_minute, limits.tokens_per_minute),
    )
    numbers = ("-" if limit is None else f"{limit:,}" for limit in most)
    return (printable(_shown(limits.tenant)), weight, *numbers)


def _sentence(limits: Limits, others: Limits | None) -> str:
    """`others`: what holds where it says nothing of its own."""
    if limits.tenant in SHOWN_NAMES or others is None:
        others = Limits(EACH)
    queued = f"{_number(limits.max_queued, others.max_queued)} may wait"
    if limits.tenant == ALL:
        return f"{_shown(limits.tenant)}: {queued}"
    running = _number(limits.max_running, others.max_running)
    said = f"{_shown(limits.tenant)}: weight {limits.weight:g}, {running} under way, {queued}"
    for what in ("requests", "tokens"):
        own, theirs = (getattr(who, f"{what}_per_minute") for who in (limits, others))
        if own is not None or theirs is not None:
            said += f", {_number(own, theirs)} {what} a minute"
    return said


def _number(most: int | None, others: int | None) -> str:
    if most is None:
        return "any number" if others is None else f"{_number(others, None)} (as each other)"
    return f"at most {most:,}" if most else "none"
