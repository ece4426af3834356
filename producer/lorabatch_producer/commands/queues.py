"""`lorabatch queues list`, `set`: which base model the jobs of a queue run with."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Annotated

import typer

from lorabatch import Settings
from lorabatch.database import open_database
from lorabatch.queue import check_name
from lorabatch.queues import Queues
from lorabatch_producer.console import printable

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Queues, each for one base model.")


@app.command("list")
def show(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Every queue that a worker has drained, and the base model of its workers."""
    with _opened() as queues:
        found = queues.list()
    if as_json:
        typer.echo(json.dumps(found))
        return
    for name, base_model in found.items():
        typer.echo(printable(f"{name}: {base_model}"))
    if not found:
        typer.echo("none: no worker has run")


@app.command("set")
def set_base_model(
    queue: Annotated[str, typer.Argument(metavar="QUEUE")],
    base_model: Annotated[str, typer.Argument(metavar="BASE_MODEL")],
) -> None:
    """Let a queue be for another base model. Stop its workers first: they are not asked."""
    with _opened() as queues:
        queues.set(check_name(queue), base_model)
    typer.echo(printable(f"{queue}: {base_model}"))


@contextlib.contextmanager
def _opened() -> Iterator[Queues]:
    engine = open_database(Settings.load())
    try:
        yield Queues(engine)
    finally:
        engine.dispose()
