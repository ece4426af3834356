"""Options of all commands that read bulk files: which files, what their rows mean, whose jobs they
are, and what these may spend."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lorabatch import Settings
from lorabatch_producer.batch import Limits
from lorabatch_producer.bulk import BadLine
from lorabatch_producer.console import printable
from lorabatch_producer.reading import ROW_OPTIONS, Reading

__all__ = [
    "SHOWN_BAD_LINES",
    "Adapter",
    "AdapterColumn",
    "BadLines",
    "Base",
    "CustomIdColumn",
    "Files",
    "Form",
    "MaxFailures",
    "MaxNewTokens",
    "MaxTokens",
    "PromptColumn",
    "PromptTemplate",
    "Queue",
    "Seed",
    "Stop",
    "System",
    "Temperature",
    "Tenant",
    "TopK",
    "TopP",
    "limits_of",
    "reading_of",
    "settings_for",
]

SHOWN_BAD_LINES = 10
ROWS = "How rows are read"
SAMPLING = "For rows that say nothing of it"


def _rows(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=ROWS)


def _sampling(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=SAMPLING)


Files = Annotated[
    list[str],
    typer.Argument(help="JSONL, CSV or Parquet, also .gz; patterns; - for stdin."),
]
Tenant = Annotated[str, typer.Option(help="Who rows without a tenant are billed to.")]
Queue = Annotated[str | None, typer.Option(help="Queue to send to.")]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Stop when its jobs have taken so many tokens.")
]
MaxFailures = Annotated[
    str | None, typer.Option(help="Stop when so many jobs have failed, or a share: 5%.")
]
Form = Annotated[
    str | None,
    typer.Option("--format", help="jsonl, csv or parquet, if not by name.", rich_help_panel=ROWS),
]
PromptColumn = Annotated[str | None, _rows("Column of the prompt.")]
PromptTemplate = Annotated[str | None, _rows("Prompt of columns: 'Summarize: {text}'.")]
System = Annotated[str | None, _rows("System message before each prompt.")]
AdapterColumn = Annotated[str | None, _rows("Column of the adapter's id.")]
CustomIdColumn = Annotated[str | None, _rows("Column of the id; else file and row number.")]
Adapter = Annotated[str | None, _rows("Adapter of rows that name none.")]
Base = Annotated[
    bool,
    typer.Option("--base", help="Rows that name none: the base model.", rich_help_panel=ROWS),
]
MaxNewTokens = Annotated[int | None, _sampling("Tokens to generate at most.")]
Temperature = Annotated[float | None, _sampling("0: the most likely token.")]
TopP = Annotated[float | None, _sampling("Nucleus of this probability.")]
TopK = Annotated[int | None, _sampling("Of the k most likely tokens.")]
Seed = Annotated[int | None, _sampling("Seed of the draws.")]
Stop = Annotated[list[str] | None, _sampling("Text ends before this; may be repeated.")]

DRAWS = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop")


def reading_of(options: dict[str, Any]) -> Reading:
    """Of a command's parameters by name."""
    form = options["form"]
    if form not in (None, "jsonl", "csv", "parquet"):
        raise typer.BadParameter(
            f"wanted jsonl, csv or parquet (got {form!r})", param_hint="--format"
        )
    sampling = {name: options[name] for name in DRAWS if options[name] not in (None, [])}
    named = {name: options[name] for name in (*ROW_OPTIONS, "adapter", "base")}
    return Reading(format=form, sampling=sampling, **named)


def settings_for(queue: str | None) -> Settings:
    """Of this queue; None: of that which they name."""
    return Settings.load(**({"queue": queue} if queue else {}))


def limits_of(max_tokens: int | None, max_failures: str | None) -> Limits:
    """Failures are a number, or a share as 5% or 0.05."""
    if max_failures is None:
        return Limits(max_tokens)
    try:
        percent = max_failures.endswith("%")
        number = float(max_failures.removesuffix("%")) / (100 if percent else 1)
        if not (0 < number < 1 or (number >= 1 and number.is_integer() and not percent)):
            raise ValueError
    except ValueError:
        raise typer.BadParameter(
            f"wanted a number from 1 or a share such as 5% (got {max_failures!r})",
            param_hint="--max-failures",
        ) from None
    return Limits(max_tokens, number)


class BadLines:
    """Counts bad lines and shows the first few."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, line: BadLine) -> None:
        self.count += 1
        if self.count <= SHOWN_BAD_LINES:
            where = f"{line.file}, " if line.file else ""
            text = printable(f"{where}line {line.number}: {line.code}: {line.message}")
            typer.secho(text, err=True, fg="yellow")

    def close(self) -> None:
        if self.count > SHOWN_BAD_LINES:
            more = self.count - SHOWN_BAD_LINES
            typer.secho(f"... and {more} more bad lines", err=True, fg="yellow")
