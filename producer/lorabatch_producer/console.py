"""How text reaches a terminal, a pipe or a log: nothing in it can act on the terminal."""

from __future__ import annotations

import sys

from rich.console import Console

__all__ = ["printable", "wide_console"]

PIPE_WIDTH = 200


def wide_console() -> Console:
    """A console for tables: as wide as the terminal, and wide enough where there is none."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


def printable(text: str) -> str:
    """The text on one line, control characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
