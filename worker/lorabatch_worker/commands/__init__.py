"""`lorabatch adapters`: the registry, and what a worker would say of an adapter.

The command line finds this package by its entry point (pyproject.toml), because producers neither
import the worker nor have what it needs. Loading it loads no torch: a command does, when it runs.
"""

from __future__ import annotations

import typer

from lorabatch_worker.commands import add, check, registry, warm

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="LoRA adapters: register, look at, check.")
app.command("add")(add.add)
app.command("list")(registry.show_all)
app.command("show")(registry.show)
app.command("check")(check.check)
app.command("remove")(registry.remove)
app.command("pin")(registry.pin)
app.command("unpin")(registry.unpin)
app.command("warm")(warm.warm)
app.command("retry")(registry.retry)
app.command("prune")(registry.prune)
