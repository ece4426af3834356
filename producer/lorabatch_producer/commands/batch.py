"""`lorabatch batch submit`, `status`, `output`, `cancel`: bulk files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lorabatch import Settings
from lorabatch_producer.batch import BatchStatus, Submitted
from lorabatch_producer.batch import submit as submit_file
from lorabatch_producer.bulk import BadLine
from lorabatch_producer.client import Producer
from lorabatch_producer.console import printable
from lorabatch_producer.output import errors_path, write_output
from lorabatch_producer.progress import follow

__all__ = ["app"]

SHOWN_BAD_LINES = 10
app = typer.Typer(no_args_is_help=True, help="Bulk JSONL files.")
File = Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True)]
Output = Annotated[Path, typer.Option(help="Results as JSONL; bad lines to *.errors.jsonl.")]


class _BadLines:
    """Counts bad lines and shows the first few."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, line: BadLine) -> None:
        self.count += 1
        if self.count <= SHOWN_BAD_LINES:
            text = printable(f"line {line.number}: {line.code}: {line.message}")
            typer.secho(text, err=True, fg="yellow")

    def close(self) -> None:
        if self.count > SHOWN_BAD_LINES:
            more = self.count - SHOWN_BAD_LINES
            typer.secho(f"... and {more} more bad lines", err=True, fg="yellow")


@app.command()
def submit(
    file: File,
    tenant: Annotated[str, typer.Option(help="Who lines without a tenant are billed to.")] = (
        "default"
    ),
    wait: Annotated[bool, typer.Option("--wait", help="Follow it to the end.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Write the results there; implies --wait.")
    ] = None,
    new: Annotated[
        bool, typer.Option("--new", help="Run it again, even if this file was submitted before.")
    ] = False,
    queue: Annotated[str | None, typer.Option(help="Queue to send to.")] = None,
) -> None:
    """Submit a file; the same file again finds the same jobs and is not billed twice."""
    bad = _BadLines()
    settings = Settings.load(**({"queue": queue} if queue else {}))
    with Producer(settings) as producer:
        submitted = submit_file(producer, file, tenant, new, bad)
        bad.close()
        _say(submitted)
        if not (wait or output):
            raise typer.Exit(1 if submitted.rejected else 0)
        status = _follow(producer, submitted.batch_id)
        if output:
            _write(producer, submitted.batch_id, file, output)
    _exit(status)


def _say(submitted: Submitted) -> None:
    typer.echo(f"batch {submitted.batch_id}")
    typer.echo(f"{submitted.accepted} lines accepted, {submitted.rejected} bad")
    if submitted.again:
        typer.echo(f"{submitted.again} of them run again: they had failed or were cancelled")
    if submitted.not_sent:
        typer.secho(str(submitted.not_sent), err=True, fg="yellow")


def _follow(producer: Producer, batch_id: str) -> BatchStatus:
    try:
        return follow(producer, batch_id, Console())
    except KeyboardInterrupt:
        typer.echo(
            f"\ninterrupted; the jobs go on: `lorabatch batch status {batch_id}`, results with "
            f"`lorabatch batch output {batch_id} FILE --output OUT`",
            err=True,
        )
        raise typer.Exit(130) from None


def _write(
    producer: Producer, batch_id: str, file: Path, output: Path, partial: bool = False
) -> None:
    written = write_output(producer.ledger, batch_id, file, output, partial)
    lines = written.succeeded + written.failed + written.cancelled + written.not_finished
    typer.echo(f"{lines} lines in {output}")
    if written.bad:
        typer.echo(f"{written.bad} bad lines in {errors_path(output)}")


def _exit(status: BatchStatus) -> None:
    parts = {
        "bad lines": status.rejected_lines,
        "failed jobs": status.failed,
        "cancelled jobs": status.cancelled,
    }
    found = [f"{what}: {count}" for what, count in parts.items() if count]
    if found:
        typer.secho(", ".join(found), err=True, fg="red")
        raise typer.Exit(1)


@app.command("status")
def batch_status(
    batch_id: str, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """A batch's jobs by state."""
    with Producer() as producer:
        show_batch(producer.status(batch_id), as_json)


def show_batch(status: BatchStatus, as_json: bool = False) -> None:
    """Print a batch's figures."""
    fields = dataclasses.asdict(status)
    if as_json:
        typer.echo(json.dumps(fields))
        return
    typer.echo(f"batch {status.batch_id} of tenant {status.tenant}, from {status.source}")
    for name in ("queued", "running", "succeeded", "failed", "cancelled", "rejected_lines"):
        typer.echo(f"  {name.replace('_', ' '):<14} {fields[name]:>9,}")
    typer.echo(f"{status.ended} of {status.total} done")


@app.command("output")
def batch_output(
    batch_id: str,
    file: File,
    output: Output,
    partial: Annotated[bool, typer.Option("--partial", help="Even if jobs are open.")] = False,
) -> None:
    """Write the results of a batch, in the order of the file it was submitted from."""
    with Producer() as producer:
        _write(producer, batch_id, file, output, partial)
        status = producer.status(batch_id)
    _exit(status)


@app.command()
def cancel(batch_id: str) -> None:
    """Cancel what is open of a batch; a running job ends at its next step.

    Submitted again, the file runs what has ended as cancelled by then."""
    with Producer() as producer:
        counts = producer.cancel_batch(batch_id)
    typer.echo(f"{counts['cancelled']} cancelled, {counts['asked']} running ones asked to stop")
