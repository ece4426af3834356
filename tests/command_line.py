"""The type of the `cli` fixture: arguments and the exit code they must end with, to a result."""

from __future__ import annotations

from collections.abc import Callable

from typer.testing import Result

Cli = Callable[..., Result]
