"""`lorabatch keys create`, `list`, `revoke`: who may use the HTTP API.

Database errors pass through.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from lorabatch import Settings
from lorabatch.database import open_database
from lorabatch.fields import is_identifier
from lorabatch.keys import DEFAULT_SCOPES, SCOPES, Key, Keys
from lorabatch.rows import moment
from lorabatch_producer.console import printable, wide_console

__all__ = ["app"]

COLUMNS = ("key", "tenant", "name", "scopes", "created, UTC", "expires", "last used", "state")
SECONDS = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}
LONGEST_S = 3650 * 86_400
NAME_CHARS = 255
app = typer.Typer(no_args_is_help=True, help="Keys of the HTTP API.")


def _duration(text: str) -> int:
    parts = re.fullmatch(r"(\d{1,9})([mhdw])", text, re.ASCII)
    seconds = int(parts[1]) * SECONDS[parts[2]] if parts else 0
    if not 0 < seconds <= LONGEST_S:
        raise typer.BadParameter(
            f"{printable(text[:80])!r}: wanted a whole number above 0 and m, h, d or w, such as "
            "30d; at most 3650d"
        )
    return seconds


@app.command()
def create(
    tenant: Annotated[str, typer.Option(metavar="T", help="Whose jobs it is for.")],
    name: Annotated[str, typer.Option(help="For people, to know it again.")] = "",
    scope: Annotated[
        list[str] | None,
        typer.Option(
            metavar="|".join(SCOPES),
            help="What it is for, again for each; admin: everything, and for every tenant by the "
            f"header LoraBatch-Tenant. Default: {', '.join(DEFAULT_SCOPES)}.",
        ),
    ] = None,
    expires: Annotated[
        int | None,
        typer.Option(parser=_duration, metavar="30d", help="For how long; else until revoked."),
    ] = None,
) -> None:
    """Make a key. It is printed this once: the database cannot say it again."""
    wanted = scope or list(DEFAULT_SCOPES)
    _check(tenant, name, wanted)
    with _opened() as keys:
        key, text = keys.create(tenant, name, wanted, expires)
    typer.echo(text)
    until = "until it is revoked" if key.expires_us is None else f"until {_when(key.expires_us)}"
    typer.echo(
        f"key {key.key_id} of tenant {tenant}, for {', '.join(key.scopes)}, {until}; keep it: "
        "it is not shown again",
        err=True,
    )


@app.command("list")
def show(
    tenant: Annotated[str | None, typer.Option(help="Of this tenant alone.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """All keys, oldest first; never what they say."""
    with _opened() as keys:
        found = keys.list(tenant)
    if as_json:
        for key in found:
            typer.echo(json.dumps(dataclasses.asdict(key)))
    elif found:
        table = Table(*COLUMNS, show_edge=False, pad_edge=False)
        for key in found:
            table.add_row(*map(Text, _cells(key)))
        wide_console().print(table)
    else:
        typer.echo("none")


@app.command()
def revoke(key_id: Annotated[str, typer.Argument(metavar="KEY_ID", show_default=False)]) -> None:
    """End a key. Servers that run refuse it after five seconds at most."""
    with _opened() as keys:
        key = keys.revoke(key_id)
    if key is None:
        raise typer.BadParameter(
            f"{printable(key_id[:20])!r}: no such key; `lorabatch keys list` has their ids, the "
            "part of a key between the first two -",
            param_hint="KEY_ID",
        )
    typer.echo(f"key {key.key_id} of tenant {key.tenant} revoked")


def _check(tenant: str, name: str, scopes: Sequence[str]) -> None:
    if not is_identifier(tenant):
        raise typer.BadParameter(
            f"{printable(tenant[:80])!r}: wanted letters, digits and _ . : @ -, the first one a "
            "letter or digit, at most 64",
            param_hint="--tenant",
        )
    if len(name) > NAME_CHARS or not name.isprintable():
        raise typer.BadParameter(
            f"wanted one line of {NAME_CHARS} characters at most", param_hint="--name"
        )
    for one in scopes:
        if one not in SCOPES:
            raise typer.BadParameter(
                f"{printable(one[:80])!r}: wanted {', '.join(SCOPES)}", param_hint="--scope"
            )


@contextlib.contextmanager
def _opened() -> Iterator[Keys]:
    engine = open_database(Settings.load())
    try:
        yield Keys(engine)
    finally:
        engine.dispose()


def _when(micros: int | None) -> str:
    return "-" if micros is None else f"{moment(micros):%Y-%m-%d %H:%M}"


def _cells(key: Key) -> tuple[str, ...]:
    ended = "expired" if key.revoked_us is None else "revoked"
    times = map(_when, (key.created_us, key.expires_us, key.last_used_us))
    scopes = ", ".join(key.scopes)
    state = "valid" if key.valid else ended
    return (key.key_id, key.tenant, printable(key.name), scopes, *times, state)
