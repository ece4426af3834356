"""`lorabatch status`, `stop`, `settings`: what runs, and with which settings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from lorabatch import Settings
from lorabatch.embedded import stop_valkey
from lorabatch.errors import JobNotFound
from lorabatch.queue import resolve_broker
from lorabatch.queues import Queues
from lorabatch.settings import PREFIX, AdapterSource
from lorabatch_producer.client import Producer
from lorabatch_producer.commands.batch import show_batch
from lorabatch_producer.console import wide_console
from lorabatch_producer.services import (
    NO_WORKER,
    masked,
    occupancies,
    queue_lengths,
    running_broker,
)

__all__ = ["setting_text", "settings", "status", "stop"]

STATES = ("queued", "running", "succeeded", "failed", "cancelled")


def status(
    job_or_batch: Annotated[str | None, typer.Argument(metavar="[JOB_ID|BATCH_ID]")] = None,
    urls: Annotated[
        bool, typer.Option("--urls", help="Print broker and database URLs with passwords.")
    ] = False,
) -> None:
    """Jobs by state, queue lengths, workers, servers; or one job or batch.

    A worker's occupancy: mean sequences a step / LORABATCH_MAX_SEQS, since it started."""
    if urls:
        loaded = Settings.load()
        typer.echo(f"LORABATCH_BROKER_URL={resolve_broker(loaded)}")
        typer.echo(f"LORABATCH_DATABASE_URL={loaded.resolved_database_url}")
        return
    with Producer() as producer:
        if job_or_batch is None:
            counts = producer.ledger.counts()
            typer.echo("jobs     " + ", ".join(f"{counts.get(s, 0):,} {s}" for s in STATES))
            _servers(producer.settings, Queues(producer.ledger.engine).list())
            return
        known = producer.ledger.states([job_or_batch])
        if known:
            typer.echo(f"job {job_or_batch} is {known[job_or_batch]}")
            return
        try:
            show_batch(producer.status(job_or_batch))
        except JobNotFound:
            raise JobNotFound(f"{job_or_batch!r}: no such job or batch in this ledger") from None


def _servers(settings: Settings, known: Iterable[str]) -> None:
    kind = "embedded" if settings.embedded_database else "server"
    typer.echo(f"database {masked(settings.resolved_database_url)} ({kind})")
    url = running_broker(settings)
    if url is None:
        typer.echo("broker   embedded, not running: the first job or worker starts it")
        typer.echo(f"workers  none: {NO_WORKER}")
        return
    kind = "embedded" if settings.embedded_broker else "server"
    typer.echo(f"broker   {masked(url)} ({kind})")
    lengths = queue_lengths(settings, url, known)
    typer.echo("queues   " + ", ".join(f"{name} {n:,}" for name, n in lengths.items()))
    found = [
        name if share is None else f"{name} (occupancy {share:.0%})"
        for name, share in occupancies(settings).items()
    ]
    typer.echo("workers  " + (", ".join(found) or f"none: {NO_WORKER}"))


def stop() -> None:
    """Stop the embedded Valkey of this LORABATCH_HOME; its data stays."""
    home = Settings.load().home
    ran = stop_valkey(home)
    typer.echo(f"embedded Valkey of {home}: " + ("stopped" if ran else "was not running"))


def settings() -> None:
    """Every setting: its variable, the value in force, the default and what it means."""
    loaded = Settings.load()
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("variable", "value", "default", "meaning"):
        table.add_column(heading, overflow="fold")
    for name, field in Settings.model_fields.items():
        value = getattr(loaded, name)
        given = {"queue": loaded.queue}  # which `consume` follows
        default = field.get_default(call_default_factory=True, validated_data=given)
        cells = (setting_text(value), setting_text(default), field.description or "")
        style = "" if name not in loaded.model_fields_set else "bold"
        table.add_row(*map(Text, (PREFIX + name.upper(), *cells)), style=style)
    wide_console().print(table)


def setting_text(value: object) -> str:
    """A setting as it would be written in its variable; passwords masked."""
    if value is None or value == ():
        return "(unset)"
    if isinstance(value, tuple):
        return ",".join(map(setting_text, value))
    if isinstance(value, AdapterSource):
        revision = f"@{value.revision}" if value.revision else ""
        return f"{value.name}={value.location}{revision}"
    return masked(str(value))
