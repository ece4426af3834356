"""`lorabatch webhooks list`, `retry`, `deliver`, and `secret` to sign them with.

Raises SettingsError, IdempotencyConflict; database errors pass through.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import sqlalchemy as sa
import typer
from rich.table import Table
from rich.text import Text

from lorabatch import Ledger, Settings
from lorabatch.database import open_database
from lorabatch.errors import SettingsError
from lorabatch.fields import is_identifier
from lorabatch.logs import configure_logging
from lorabatch.outbox import Outbox
from lorabatch.rows import moment
from lorabatch.webhook_secrets import OVERLAP_S, Secret, Secrets
from lorabatch_producer.console import printable, wide_console

__all__ = ["app"]

SHOWN = 1000
COLUMNS = ("webhook", "tenant", "event", "of", "url", "happened, UTC", "state", "attempts", "why")
FIELDS = (
    *("webhook_id", "tenant", "event", "subject", "url", "state", "attempts", "happened_us"),
    *("due_us", "ended_us", "status", "error"),
)
app = typer.Typer(no_args_is_help=True, help="Webhooks of jobs and batches that have ended.")
secret = typer.Typer(no_args_is_help=True, help="What a tenant's webhooks are signed with.")
app.add_typer(secret, name="secret")
OfTenant = Annotated[str | None, typer.Option(help="Of this tenant alone.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


def _tenant(text: str) -> str:
    if not is_identifier(text):
        raise typer.BadParameter(
            f"{printable(text[:80])!r}: wanted letters, digits and _ . : @ -, at most 64"
        )
    return text


Tenant = Annotated[str, typer.Option(metavar="T", parser=_tenant, help="Whose.")]


@app.command("list")
def show(
    failed: Annotated[bool, typer.Option("--failed", help="Those that were given up.")] = False,
    tenant: OfTenant = None,
    as_json: AsJson = False,
) -> None:
    """What waits to be delivered; with --failed, what was given up; oldest first."""
    with _opened() as engine:
        found = Outbox(engine).list("failed" if failed else "waiting", tenant, SHOWN + 1)
    for row in found[:SHOWN] if as_json else ():
        typer.echo(json.dumps({name: getattr(row, name) for name in FIELDS}))
    if found and not as_json:
        _print(COLUMNS, [_cells(row) for row in found[:SHOWN]])
    elif not found:
        typer.echo("none")
    if len(found) > SHOWN:
        typer.secho(f"... and more: these are the oldest {SHOWN:,}", err=True, fg="yellow")


@app.command()
def retry(
    webhook_ids: Annotated[
        list[str] | None, typer.Argument(metavar="WEBHOOK_ID...", show_default=False)
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All that were given up.")] = False,
) -> None:
    """Deliver again what was given up, under the same ids."""
    if bool(webhook_ids) == every:
        raise typer.BadParameter("give the ids of webhooks, or --all")
    with _opened() as engine:
        again = Outbox(engine).retry(webhook_ids)
    unknown = sorted(set(webhook_ids or ()) - set(again))
    for webhook_id in again:
        typer.echo(webhook_id)
    if unknown:
        raise typer.BadParameter(
            f"{printable(unknown[0][:80])!r}: not among those that were given up; `lorabatch "
            "webhooks list --failed` has them",
            param_hint="WEBHOOK_ID",
        )
    if not again:
        typer.echo("none")


@app.command()
def deliver() -> None:
    """Deliver webhooks until SIGINT or SIGTERM, as every `lorabatch serve` does too."""
    settings = Settings.load()
    if not settings.webhook_senders:
        raise SettingsError("LORABATCH_WEBHOOK_SENDERS: it is 0, wanted 1 or more to deliver")
    try:
        from lorabatch_producer.webhook_sender import WebhookSender
    except ImportError as error:
        raise SettingsError(
            f"webhooks: {error.name} is not installed; pip install 'lorabatch[server]'"
        ) from None
    configure_logging(settings)

    async def run(ledger: Ledger) -> None:
        stop = asyncio.Event()
        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(name, stop.set)
        async with WebhookSender(ledger, settings):
            await stop.wait()

    with _opened(settings) as engine:
        asyncio.run(run(Ledger(engine)))


@secret.command()
def create(tenant: Tenant) -> None:
    """Make the first secret of a tenant, and print it."""
    with _opened() as engine:
        _told(Secrets(engine).create(tenant))


@secret.command()
def rotate(
    tenant: Tenant,
    overlap_h: Annotated[
        float, typer.Option(min=0, max=8760, help="Hours for which those before it sign too.")
    ] = OVERLAP_S / 3600,
) -> None:
    """Make another one, and print it."""
    with _opened() as engine:
        _told(Secrets(engine).rotate(tenant, overlap_h * 3600))


@secret.command("list")
def secrets(
    tenant: OfTenant = None,
    reveal: Annotated[bool, typer.Option("--reveal", help="With what they say.")] = False,
) -> None:
    """Secrets, the newest first."""
    with _opened() as engine:
        found = Secrets(engine).list(tenant)
    rows = [
        (
            *(one.secret_id, one.tenant, _when(one.created_us), _when(one.expires_us)),
            "signs" if one.valid else "ended",
            *([one.secret] if reveal else []),
        )
        for one in found
    ]
    columns = ("secret", "tenant", "created, UTC", "expires", "state", "text")
    if rows:
        _print(columns[: len(rows[0])], rows)
    else:
        typer.echo("none")


@secret.command()
def revoke(
    secret_id: Annotated[str, typer.Argument(metavar="SECRET_ID", show_default=False)],
) -> None:
    """End a secret now: if there is no other, webhooks wait for one."""
    with _opened() as engine:
        gone = Secrets(engine).revoke(secret_id)
    if gone is None:
        raise typer.BadParameter(
            f"{printable(secret_id[:20])!r}: no such secret; `lorabatch webhooks secret list` has "
            "their ids",
            param_hint="SECRET_ID",
        )
    typer.echo(f"secret {gone.secret_id} of tenant {gone.tenant} revoked")


@contextlib.contextmanager
def _opened(settings: Settings | None = None) -> Iterator[sa.Engine]:
    engine = open_database(settings or Settings.load())
    try:
        yield engine
    finally:
        engine.dispose()


def _told(made: Secret) -> None:
    typer.echo(made.secret)
    typer.echo(f"secret {made.secret_id} of tenant {made.tenant}", err=True)


def _print(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*columns, show_edge=False, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    wide_console().print(table)


def _when(micros: int | None) -> str:
    return "-" if micros is None else f"{moment(micros):%Y-%m-%d %H:%M:%S}"


def _cells(row: Any) -> tuple[str, ...]:
    what = (row.webhook_id, row.tenant, row.event, row.subject, row.url, _when(row.happened_us))
    return (*what, row.state, str(row.attempts), row.error or "-")
