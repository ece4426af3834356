"""`lorabatch batch`: bulk files; `estimate` is a file of its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lorabatch.stopping import resume
from lorabatch_producer.batch import BatchStatus, Limits, Submitted
from lorabatch_producer.batch import reading_of as how_read
from lorabatch_producer.batch import submit as submit_files
from lorabatch_producer.client import Producer
from lorabatch_producer.commands.estimate import estimate
from lorabatch_producer.commands.row_options import (
    Adapter,
    AdapterColumn,
    BadLines,
    Base,
    CustomIdColumn,
    Files,
    Form,
    MaxFailures,
    MaxNewTokens,
    MaxTokens,
    PromptColumn,
    PromptTemplate,
    Queue,
    Seed,
    Stop,
    System,
    Temperature,
    Tenant,
    TopK,
    TopP,
    limits_of,
    reading_of,
    settings_for,
)
from lorabatch_producer.inputs import Inputs, gathered
from lorabatch_producer.output import check_output, errors_path, write_output
from lorabatch_producer.progress import follow
from lorabatch_producer.watching import watch as watch_batches

__all__ = ["app", "end", "show_batch"]

app = typer.Typer(no_args_is_help=True, help="Bulk files.")
app.command("estimate")(estimate)
Output = Annotated[
    Path, typer.Option(help="Results as .jsonl, .csv or .parquet; bad lines to *.errors.jsonl.")
]
OutputAfter = Annotated[Path | None, typer.Option(help="Write the results there; implies --wait.")]
WithInput = Annotated[
    bool, typer.Option("--with-input", help="What stood in each row beside its result.")
]
Wait = Annotated[bool, typer.Option("--wait", help="Follow it to the end.")]
Watch = Annotated[bool, typer.Option("--watch", help="As --wait, with each adapter's progress.")]
New = Annotated[
    bool, typer.Option("--new", help="Run it again, even if this file was submitted before.")
]


@app.command()
def submit(
    files: Files,
    tenant: Tenant = "default",
    wait: Wait = False,
    watch: Watch = False,
    output: OutputAfter = None,
    with_input: WithInput = False,
    new: New = False,
    queue: Queue = None,
    max_tokens_total: MaxTokens = None,
    max_failures: MaxFailures = None,
    form: Form = None,
    prompt_column: PromptColumn = None,
    prompt_template: PromptTemplate = None,
    system: System = None,
    adapter_column: AdapterColumn = None,
    custom_id_column: CustomIdColumn = None,
    adapter: Adapter = None,
    base: Base = False,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
) -> None:
    """Submit files as one batch; the same again finds the same jobs and is not billed twice."""
    reading, limits = reading_of(locals()), limits_of(max_tokens_total, max_failures)
    if with_input and output is None:
        raise typer.BadParameter("is for results: give --output, too", param_hint="--with-input")
    with gathered(files, reading) as inputs, Producer(settings_for(queue)) as producer:
        if output is not None:
            check_output(inputs, output, with_input)
        status = _submit(
            producer, inputs, tenant, new, limits, wait or watch or bool(output), watch
        )
        if output is not None:
            _write(producer, status.batch_id, inputs, output, with_input=with_input)
    end(status)


def _submit(
    producer: Producer,
    inputs: Inputs,
    tenant: str,
    new: bool,
    limits: Limits,
    wait: bool,
    watch: bool,
) -> BatchStatus:
    """The batch when it has ended; who does not wait for that leaves."""
    bad = BadLines()
    submitted = submit_files(producer, inputs, tenant, new, bad, limits)
    bad.close()
    _say(submitted)
    if not wait:
        raise typer.Exit(1 if submitted.rejected else 0)
    return _follow(producer, submitted.batch_id, watch)


def _say(submitted: Submitted) -> None:
    typer.echo(f"batch {submitted.batch_id}")
    typer.echo(f"{submitted.accepted} lines accepted, {submitted.rejected} bad")
    if submitted.again:
        typer.echo(f"{submitted.again} of them run again: they had failed or were cancelled")
    if submitted.not_sent:
        typer.secho(str(submitted.not_sent), err=True, fg="yellow")


def _follow(producer: Producer, batch_id: str, watch: bool = False) -> BatchStatus:
    try:
        if watch:
            return watch_batches(producer, [batch_id], Console())[0]
        return follow(producer, batch_id, Console())
    except KeyboardInterrupt:
        typer.echo(
            f"\ninterrupted; the jobs go on: `lorabatch batch status {batch_id}`, results with "
            f"`lorabatch batch output {batch_id} FILE --output OUT`",
            err=True,
        )
        raise typer.Exit(130) from None


def _write(
    producer: Producer,
    batch_id: str,
    inputs: Inputs,
    output: Path,
    partial: bool = False,
    with_input: bool = False,
) -> None:
    written = write_output(producer.ledger, batch_id, inputs, output, partial, with_input)
    lines = written.succeeded + written.failed + written.cancelled + written.not_finished
    typer.echo(f"{lines} lines in {output}")
    if written.bad:
        typer.echo(f"{written.bad} bad lines in {errors_path(output)}")


def end(status: BatchStatus) -> None:
    """The exit code of a batch that has ended."""
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
    if status.budget.exhausted:
        typer.echo(f"stopped: {status.budget.exhausted}")


@app.command("output")
def batch_output(
    batch_id: str,
    files: Files,
    output: Output,
    partial: Annotated[bool, typer.Option("--partial", help="Even if jobs are open.")] = False,
    with_input: WithInput = False,
) -> None:
    """Write the results of a batch, in the order of the files it was submitted from."""
    with (
        Producer() as producer,
        gathered(files, how_read(producer.ledger, batch_id)) as inputs,
    ):
        _write(producer, batch_id, inputs, output, partial, with_input)
        status = producer.status(batch_id)
    end(status)


@app.command("watch")
def batch_watch(
    batch_ids: Annotated[list[str], typer.Argument(help="One or several.")],
) -> None:
    """Progress of batches, live, until all have ended; interrupted, they go on."""
    with Producer() as producer:
        found = watch_batches(producer, batch_ids, Console())
    for status in sorted(found, key=_bad_ones):
        end(status)


def _bad_ones(status: BatchStatus) -> int:
    return -(status.failed + status.cancelled + status.rejected_lines)


@app.command("resume")
def batch_resume(
    batch_id: str,
    max_tokens_total: MaxTokens = None,
    max_failures: Annotated[
        int | None, typer.Option(min=1, help="Stop when so many more jobs have failed.")
    ] = None,
) -> None:
    """Run again what failed or was cancelled of a batch, and raise what it may spend.

    Needs no file: the ledger has the requests. Lines that were never accepted are not in it."""
    with Producer() as producer:
        again = resume(producer.ledger.engine, batch_id, max_tokens_total, max_failures)
    typer.echo(f"batch {batch_id}: {len(again.jobs)} jobs run again")
    if again.full is not None:
        raise again.full


@app.command()
def cancel(batch_id: str) -> None:
    """Cancel what is open of a batch; a running job ends at its next step.

    Submitted again, the file runs what has ended as cancelled by then."""
    with Producer() as producer:
        counts = producer.cancel_batch(batch_id)
    typer.echo(f"{counts['cancelled']} cancelled, {counts['asked']} running ones asked to stop")
