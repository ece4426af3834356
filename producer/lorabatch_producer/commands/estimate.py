"""`lorabatch batch estimate`: what files would take, before anything of them is accepted."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from lorabatch_producer.bulk import BadLine
from lorabatch_producer.client import Producer
from lorabatch_producer.commands.row_options import (
    SHOWN_BAD_LINES,
    Adapter,
    AdapterColumn,
    BadLines,
    Base,
    CustomIdColumn,
    Files,
    Form,
    MaxNewTokens,
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
    reading_of,
    settings_for,
)
from lorabatch_producer.console import printable, wide_console
from lorabatch_producer.estimating import Estimate
from lorabatch_producer.estimating import estimate as estimate_files
from lorabatch_producer.inputs import gathered

__all__ = ["estimate"]


def estimate(
    files: Files,
    tenant: Tenant = "default",
    queue: Queue = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
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
    """What files would take: rows, tokens, adapters and time. Accepts nothing."""
    reading = reading_of(locals())
    bad, first = BadLines(), list[BadLine]()

    def on_bad(line: BadLine) -> None:
        bad(line)
        if len(first) < SHOWN_BAD_LINES:
            first.append(line)

    with gathered(files, reading) as inputs, Producer(settings_for(queue)) as producer:
        found = estimate_files(producer, inputs, tenant, on_bad)
    bad.close()
    if as_json:
        lines = [json.loads(line.as_json()) for line in first]
        typer.echo(json.dumps({**found.as_json(), "bad_lines": lines}))
    else:
        _show(found)
    raise typer.Exit(1 if found.rejected else 0)


def _show(found: Estimate) -> None:
    console = wide_console()
    console.print(_table(found), highlight=False)
    lines = [
        f"{found.total('rows')} rows are jobs, {found.rejected} are bad",
        _tokens_from(found),
        _output_from(found),
        _swaps(found),
        _time(found),
    ]
    if found.known:
        lines.append(
            f"submitted before as batch {found.batch_id}: what succeeded does not run again"
        )
    for line in lines:
        typer.echo(printable(line))


def _table(found: Estimate) -> Table:
    table = Table(show_footer=True, show_edge=False, pad_edge=False)
    table.add_column("adapter", footer="all", overflow="fold")
    names = ("rows", "prompt_tokens", "output_tokens", "output_tokens_max")
    heads = ("rows", "prompt tokens", "output tokens", "at most")
    for name, head in zip(names, heads, strict=True):
        table.add_column(head, footer=f"{found.total(name):,}", justify="right", no_wrap=True)
    for one in found.by_name:
        figures = [f"{getattr(one, name):,}" for name in names]
        table.add_row(Text(one.adapter_id or "(base model)"), *figures)
    return table


def _tokens_from(found: Estimate) -> str:
    how = f"prompts: {found.chars_per_token:.2f} characters a token, "
    if found.past.chars_per_token is None:
        return f"{how}a rule of thumb: the ledger has no past jobs of {found.base_model}"
    return f"{how}as past jobs of {found.base_model} had"


def _output_from(found: Estimate) -> str:
    known = len(found.adapters) - len(found.unmeasured)
    if not known:
        return "output: at most max_new_tokens; no past jobs say how much of it comes"
    if not found.unmeasured:
        return "output: what past jobs of each adapter generated, on average"
    names = ", ".join(name or "(base model)" for name in found.unmeasured[:SHOWN_BAD_LINES])
    more = len(found.unmeasured) - SHOWN_BAD_LINES
    rest = f" and {more} more" if more > 0 else ""
    return f"output: the average of past jobs; the most that is asked for, of {names}{rest}"


def _swaps(found: Estimate) -> str:
    fits = [
        f"{slots} slots on a {kind.upper()}: "
        + (f"at least {found.swaps[kind]} swaps" if found.swaps[kind] else "all fit")
        for kind, slots in found.slots.items()
    ]
    return f"adapters: {len(found.adapters.keys() - {None})}; {', '.join(fits)}"


def _time(found: Estimate) -> str:
    likely, most = found.seconds("output_tokens"), found.seconds("output_tokens_max")
    if likely is None or most is None:
        return f"time: unknown, the ledger has no past jobs of {found.base_model}"
    ended = datetime.fromtimestamp((found.past.latest_us or 0) / 1e6, UTC)
    return (
        f"time: {_span(likely)}, at most {_span(most)}, at {found.past.tokens_per_s:.1f} tokens/s, "
        f"as past jobs had together until {ended:%Y-%m-%d %H:%M} UTC; other work is not counted"
    )


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
