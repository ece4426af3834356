"""`lorabatch bakeoff`: the same prompts with several adapters, side by side on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lorabatch_producer.batch import BatchStatus, Limits, submit
from lorabatch_producer.client import Producer
from lorabatch_producer.commands.batch import end
from lorabatch_producer.commands.row_options import (
    BadLines,
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
from lorabatch_producer.inputs import gathered
from lorabatch_producer.side_by_side import SideBySide, check_places, write_comparison
from lorabatch_producer.watching import watch

__all__ = ["bakeoff"]


def bakeoff(
    files: Files,
    adapters: Annotated[str, typer.Option(help="Names, separated by commas.")],
    output: Annotated[Path, typer.Option(help="Page of HTML to write.")],
    base: Annotated[bool, typer.Option("--base", help="The base model, too.")] = False,
    csv: Annotated[Path | None, typer.Option(help="The same as a table.")] = None,
    tenant: Tenant = "default",
    queue: Queue = None,
    max_tokens_total: MaxTokens = None,
    max_failures: MaxFailures = None,
    form: Form = None,
    prompt_column: PromptColumn = None,
    prompt_template: PromptTemplate = None,
    system: System = None,
    custom_id_column: CustomIdColumn = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
) -> None:
    """Every prompt with each of these adapters, whichever a row names, and with the same seeds.

    One batch, waited for. The same command again goes on where it was."""
    reading = reading_of({**locals(), "adapter": None, "adapter_column": None, "base": True})
    limits = limits_of(max_tokens_total, max_failures)
    names = (*([None] if base else []), *(name.strip() for name in adapters.split(",")))
    with gathered(files, reading) as inputs, Producer(settings_for(queue)) as producer:
        check_places(inputs, output, csv)
        sides = SideBySide(inputs.sources, reading, names)
        status = _wait(producer, _submit(producer, sides, tenant, limits))
        rows = write_comparison(producer, status, sides, output, csv)
    typer.echo(f"{rows} prompts with {len(names)} adapters in {output}")
    end(status)


def _submit(producer: Producer, sides: SideBySide, tenant: str, limits: Limits) -> str:
    """The batch's id."""
    bad = BadLines()
    submitted = submit(producer, sides, tenant, on_bad=bad, limits=limits)
    bad.close()
    typer.echo(f"batch {submitted.batch_id}: {submitted.accepted} jobs")
    if submitted.not_sent:
        typer.secho(str(submitted.not_sent), err=True, fg="yellow")
    return submitted.batch_id


def _wait(producer: Producer, batch_id: str) -> BatchStatus:
    try:
        return watch(producer, [batch_id], Console())[0]
    except KeyboardInterrupt:
        typer.echo("\ninterrupted; the jobs go on: the same command again waits for them", err=True)
        raise typer.Exit(130) from None
