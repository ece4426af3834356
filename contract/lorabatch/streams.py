"""Text of jobs as it grows: what a worker sends to the broker, and how whoever follows reads it.

A job with `stream` has a Redis stream of its own. Each entry is a piece of text and the number of
characters before it, so that a follower who comes late, or comes again, knows what it has; a job
that is run again sends the same pieces again. A hint, as every message: pieces may be missing, and
the text that counts is the result's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

__all__ = ["KEPT_S", "LONGEST", "Followed", "Piece", "piece_of", "stream_key"]

KEPT_S: Final = 600
"""How long the pieces of a job stay after the last one."""
LONGEST: Final = 20_000
"""Pieces of one job, about; older ones go first."""


class Piece(NamedTuple):
    """`text` comes after `at` characters of the job's text."""

    job_id: str
    at: int
    text: str


def stream_key(job_id: str) -> str:
    return f"lorabatch:text:{job_id}"


def piece_of(job_id: str, entry: Mapping[bytes, bytes]) -> Piece:
    """From an entry's fields `at` and `text`."""
    return Piece(job_id, int(entry[b"at"]), entry[b"text"].decode())


class Followed:
    """What a follower has of one text; `had`: how many characters of it somebody has already."""

    def __init__(self, had: int = 0) -> None:
        self.text = ""
        self._had = had

    def take(self, piece: Piece) -> str:
        """What is new in a piece. Nothing, from a gap on: `rest` has it then."""
        new = piece.text[max(0, len(self.text) - piece.at) :]
        if piece.at > len(self.text) or not new:
            return ""
        return self._more(new)

    def rest(self, text: str) -> str | None:
        """What is left of the whole text; None: it is another one than what came before."""
        if not text.startswith(self.text):
            return None
        return self._more(text[len(self.text) :])

    def _more(self, new: str) -> str:
        before = len(self.text)
        self.text += new
        return new[max(0, self._had - before) :]
