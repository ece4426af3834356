"""`lorabatch dead list`, `retry`, `drop`: jobs that were given up because they stopped the workers.

Raises JobNotFound, QueueFull; database errors pass through.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from lorabatch import Settings
from lorabatch.database import open_database
from lorabatch.dead import DeadLetter, DeadLetters
from lorabatch.rows import moment
from lorabatch_producer.console import printable, wide_console

__all__ = ["app"]

SHOWN = 1000
EVERYTHING = 1_000_000
COLUMNS = ("job", "tenant", "adapter", "died, UTC", "attempts", "crashes", "reason")
app = typer.Typer(no_args_is_help=True, help="Jobs that were given up: they stopped the workers.")
JobIds = Annotated[list[str] | None, typer.Argument(metavar="JOB_ID...", show_default=False)]
All = Annotated[bool, typer.Option("--all", help="All that `dead list` shows.")]


@app.command("list")
def show(
    tenant: Annotated[str | None, typer.Option(help="Of this tenant alone.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Those that nobody has handled, oldest first."""
    with _opened() as dead:
        found = dead.list(tenant, SHOWN + 1)
    if as_json:
        for letter in found[:SHOWN]:
            typer.echo(json.dumps(dataclasses.asdict(letter)))
    elif found:
        wide_console().print(_table(found[:SHOWN]))
    else:
        typer.echo("none")
    if len(found) > SHOWN:
        typer.secho(f"... and more: these are the oldest {SHOWN:,}", err=True, fg="yellow")


@app.command()
def retry(job_ids: JobIds = None, every: All = False) -> None:
    """Run their requests again, as new jobs: prints the old id and the new one.

    What was given up keeps its outcome. A new job has its attempts before it. Where fewer may wait,
    the others stay on the list."""
    with _opened() as dead:
        chosen = _chosen(dead, job_ids, every)
        again = dead.retry(chosen)
    for job_id in chosen:
        if job_id in again.jobs:
            typer.echo(f"{job_id} -> {again.jobs[job_id]}")
    if not chosen:
        typer.echo("none")
    if again.full is not None:
        raise again.full


@app.command()
def drop(job_ids: JobIds = None, every: All = False) -> None:
    """Take them off the list. They keep their outcome; their batch's file, if it is submitted
    again, runs them again."""
    with _opened() as dead:
        chosen = _chosen(dead, job_ids, every)
        dead.drop(chosen)
    typer.echo(f"{len(chosen)} dropped")


@contextlib.contextmanager
def _opened() -> Iterator[DeadLetters]:
    engine = open_database(Settings.load())
    try:
        yield DeadLetters(engine)
    finally:
        engine.dispose()


def _chosen(dead: DeadLetters, job_ids: list[str] | None, every: bool) -> list[str]:
    if bool(job_ids) == every:
        raise typer.BadParameter("give the ids of jobs, or --all")
    if every:
        return [letter.job_id for letter in dead.list(limit=EVERYTHING)]
    return list(dict.fromkeys(job_ids or ()))


def _table(letters: Sequence[DeadLetter]) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    for column in COLUMNS:
        right = column in ("attempts", "crashes")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for letter in letters:
        cells = (
            letter.job_id,
            letter.tenant,
            letter.adapter_id or "(base model)",
            f"{moment(letter.died_us):%Y-%m-%d %H:%M:%S}",
            str(letter.attempts),
            str(letter.crashes),
            letter.reason,
        )
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table
