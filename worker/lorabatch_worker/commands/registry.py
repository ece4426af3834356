"""`lorabatch adapters list|show|remove|pin|unpin|retry|prune`: the registry by hand.

Without --tenant a command is about adapters that everybody may use. Errors are of the tree.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lorabatch.database import open_database
from lorabatch.errors import UnknownAdapter
from lorabatch.registry import SHARED, Registered, Registry
from lorabatch.settings import Settings

__all__ = ["pin", "prune", "remove", "retry", "show", "show_all", "unpin"]

Name = Annotated[str, typer.Argument(help="NAME or OWNER/NAME")]
Tenant = Annotated[str | None, typer.Option(help="whose it is; left out: everybody's")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object a line")]
WIDTH = 200
COLUMNS = ("adapter", "tenant", "version", "rank", "MB", "checked against", "since", "state")


def one_line(text: str) -> str:
    """Nothing in it can act on the terminal: names of tensors and paths are whoever's."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@contextlib.contextmanager
def opened() -> Iterator[tuple[Settings, Registry]]:
    settings = Settings.load()
    engine = open_database(settings)
    try:
        yield settings, Registry(engine, settings.base_model)
    finally:
        engine.dispose()


def show_all(
    tenant: Annotated[str | None, typer.Option(help="what this tenant may use")] = None,
    as_json: Json = False,
) -> None:
    """What names stand for now."""
    with opened() as (_, registry):
        _print(registry.names(tenant), as_json)


def show(name: Name, tenant: Tenant = None, as_json: Json = False) -> None:
    """Every version of one adapter, newest first, with what is wrong with it."""
    with opened() as (_, registry):
        versions = _versions(registry, name, tenant)
    _print(versions, as_json)
    for entry in [] if as_json else versions:
        typer.echo(f"{entry.version}  {entry.location}")
        if entry.fault is not None:
            typer.echo(one_line(f"  failed {entry.fault.failures} times: {entry.fault.reason}"))


def remove(name: Name, tenant: Tenant = None) -> None:
    """Forget a name. What is queued still runs; files that nobody needs any more go."""
    with opened() as (settings, registry):
        waiting = registry.remove(tenant or SHARED, name)
        gone = _prune(settings, registry, [(tenant or SHARED, name)])
    still = f"; {waiting} open jobs still run with it" if waiting else ""
    typer.echo(f"removed: {name} for {tenant or 'everybody'}, {gone} versions deleted{still}")


def pin(name: Name, tenant: Tenant = None) -> None:
    """Let workers load it when they start, and keep it in memory and on disk."""
    with opened() as (_, registry):
        registry.pin(tenant or SHARED, name, True)
    whose = f" --tenant {tenant}" if tenant else ""
    typer.echo(f"pinned: {name}; `lorabatch adapters warm {name}{whose}` loads it now")


def unpin(name: Name, tenant: Tenant = None) -> None:
    """Let it go like others when room is needed."""
    with opened() as (_, registry):
        registry.pin(tenant or SHARED, name, False)
    typer.echo(f"not pinned: {name}")


def retry(name: Name, tenant: Tenant = None) -> None:
    """Let an adapter that was set aside be tried again at once."""
    with opened() as (_, registry):
        versions = _versions(registry, name, tenant)
        faulty = [entry for entry in versions if entry.fault is not None]
        for entry in faulty:
            registry.forgive(entry.key)
    typer.echo(f"to be tried again: {len(faulty)} versions of {name}")


def prune() -> None:
    """Delete versions that no name stands for and no open job is bound to."""
    with opened() as (settings, registry):
        typer.echo(f"deleted: {_prune(settings, registry)} versions")


def _versions(registry: Registry, name: str, tenant: str | None) -> list[Registered]:
    versions = registry.versions(tenant or SHARED, name)
    if not versions:
        raise UnknownAdapter(
            f"adapter {name!r}: not registered for {tenant or 'everybody'}; "
            "see `lorabatch adapters list`"
        )
    return versions


def _prune(
    settings: Settings, registry: Registry, names: Collection[tuple[str, str]] | None = None
) -> int:
    """Of these names, or of all: how many went."""
    gone = registry.prune(names)
    needed = {entry.location for entry in registry.everything()}
    store = settings.adapter_store_folder
    for entry in gone:
        folder = Path(entry.location)
        if folder.parent == store and entry.location not in needed and folder.is_dir():
            # Out of sight at once: who registers the same files again must not find half of them.
            trash = store / ".trash"
            trash.mkdir(exist_ok=True)
            last = folder.rename(trash / f"{folder.name}-{uuid.uuid4().hex}")
            shutil.rmtree(last, ignore_errors=True)
    return len(gone)


def _print(entries: Sequence[Registered], as_json: bool) -> None:
    if as_json:
        for entry in entries:
            typer.echo(json.dumps(asdict(entry)))
        return
    table = Table(box=None, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in ("rank", "MB") else "left")
    for e in entries:
        since = datetime.fromtimestamp(e.created_us / 1e6, UTC)
        rank = "" if e.rank is None else str(e.rank)
        size, base = f"{e.nbytes / 1e6:.1f}", e.base_model or "not checked"
        whose, day = e.tenant or "everybody", f"{since:%Y-%m-%d %H:%M}"
        table.add_row(e.adapter_id, whose, e.version[:12], rank, size, base, day, _state(e))
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(table)


def _state(entry: Registered) -> str:
    words = ["pinned"] if entry.pinned else []
    if not entry.current:
        words.append("superseded")
    if entry.fault is not None:
        again = datetime.fromtimestamp(entry.fault.retry_us / 1e6, UTC)
        words.append(f"set aside until {again:%H:%M:%S} UTC ({entry.fault.code})")
    return ", ".join(words) or "ok"
