"""`lorabatch doctor`: what is installed, reachable and in place, and what to do if not."""

from __future__ import annotations

from collections import Counter

import typer

from lorabatch import Settings
from lorabatch.settings import PREFIX
from lorabatch_producer.checks import checks
from lorabatch_producer.commands.server import setting_text

__all__ = ["doctor"]

COLOURS = {"ok": "green", "warning": "yellow", "missing": "red"}


def doctor() -> None:
    """Check this machine and these settings; exit code 1 if something needed is missing."""
    settings = Settings.load()
    states = Counter[str]()
    for check in checks(settings):
        states[check.state] += 1
        state = typer.style(f"{check.state:<8}", fg=COLOURS[check.state])
        typer.echo(f"{state} {check.name:<14} {check.text}")
    given = sorted(settings.model_fields_set)
    typer.echo("settings given: " + ("" if given else "none, all defaults"))
    for name in given:
        typer.echo(f"  {PREFIX}{name.upper()}={setting_text(getattr(settings, name))}")
    typer.echo(f"{states['missing']} missing, {states['warning']} warnings")
    raise typer.Exit(1 if states["missing"] else 0)
