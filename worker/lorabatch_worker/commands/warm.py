"""`lorabatch adapters warm`: workers load an adapter ahead of its jobs."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from lorabatch.errors import WaitTimeout
from lorabatch.queue import make_app
from lorabatch_worker.commands.registry import Name, opened

__all__ = ["warm"]

REPLY_S, PAUSE_S = 2.0, 0.5
LOADING = "loading"


def warm(
    name: Name,
    tenant: Annotated[str | None, typer.Option(help="on whose behalf")] = None,
    timeout_s: Annotated[float, typer.Option(help="how long to wait for it")] = 600.0,
) -> None:
    """Have every running worker load it into memory; 1 if one cannot."""
    with opened() as (settings, registry):
        entry = registry.find(tenant or "default", name)
    app = make_app(settings)
    arguments = {"tenant": tenant or "default", "adapter_id": name}
    arguments["version"] = entry.version if entry else ""
    deadline_s = time.monotonic() + timeout_s
    try:
        while True:
            said = _ask(app, arguments)
            if LOADING not in said.values():
                break
            if time.monotonic() > deadline_s:
                raise WaitTimeout(f"adapter {name!r}: not loaded after {timeout_s:.0f} s: {said}")
            time.sleep(PAUSE_S)
    finally:
        app.close()
    for worker, answer in sorted(said.items()):
        typer.echo(f"{worker}: {answer}")
    if not said:
        typer.echo("no worker answers")
    if not said or any(answer != "loaded" for answer in said.values()):
        raise typer.Exit(1)


def _ask(app: Any, arguments: dict[str, str]) -> dict[str, str]:
    replies = app.control.broadcast(
        "warm_adapter", arguments=arguments, reply=True, timeout=REPLY_S
    )
    return {
        worker: str(answer.get("ok", answer))
        for reply in replies or ()
        for worker, answer in reply.items()
    }
