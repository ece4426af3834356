"""`lorabatch why`: why a job waits, or how it runs or ended."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from lorabatch_producer.client import Producer
from lorabatch_producer.services import loads, places
from lorabatch_producer.why import adapters_of, facts
from lorabatch_producer.why_lines import lines

__all__ = ["why"]


def why(
    job_id: str, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Say why a job waits: what is before it, limits, its adapter, workers; or how it ended."""
    with Producer() as producer:
        found = facts(producer.ledger.engine, job_id)
        workers = loads(producer.settings, found.queue) if found.how is None else {}
        asked = adapters_of(found) if workers else {}
        where = places(producer.settings, found.tenant, asked, list(workers))
    said = lines(found, workers, where)
    if as_json:
        typer.echo(
            json.dumps(
                {**dataclasses.asdict(found), "workers": workers, "places": where, "lines": said}
            )
        )
        return
    for line in said:
        typer.echo(line)
