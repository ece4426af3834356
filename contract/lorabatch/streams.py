"""Text of jobs as it grows: what a worker sends to the broker, and how whoever follows reads it.

A job with `stream` has a Redis stream of its own. Each entry is a piece of text and the number of
characters before it, so that a follower who comes late, or comes again, knows what it has; a job
that is run again sends the same pieces again. Where log probabilities were asked for it has the
tokens that came since the piece before, counted alike. A hint, as every message: pieces may be
missing, and the text that counts is the result's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from pydantic import TypeAdapter

from lorabatch.result import Result, Token

__all__ = ["KEPT_S", "LONGEST", "Followed", "Piece", "entry_of", "piece_of", "stream_key"]

TOKENS: Final = TypeAdapter(tuple[Token, ...])

KEPT_S: Final = 600
"""How long the pieces of a job stay after the last one."""
LONGEST: Final = 20_000
"""Pieces of one job, about; older ones go first."""


class Piece(NamedTuple):
    """`text` comes after `at` characters of the job's text, `tokens` after `tokens_at` of its
    tokens."""

    job_id: str
    at: int
    text: str
    tokens_at: int = 0
    tokens: tuple[Token, ...] = ()


def stream_key(job_id: str) -> str:
    return f"lorabatch:text:{job_id}"


def entry_of(piece: Piece) -> dict[str, str | int | bytes]:
    """A piece as fields of an entry."""
    entry: dict[str, str | int | bytes] = {"at": piece.at, "text": piece.text}
    if piece.tokens:
        entry |= {"tokens_at": piece.tokens_at, "tokens": TOKENS.dump_json(piece.tokens)}
    return entry


def piece_of(job_id: str, entry: Mapping[bytes, bytes]) -> Piece:
    """From an entry's fields."""
    tokens = TOKENS.validate_json(entry.get(b"tokens", b"[]"))
    at = int(entry.get(b"tokens_at", b"0"))
    return Piece(job_id, int(entry[b"at"]), entry[b"text"].decode(), at, tokens)


class Followed:
    """What a follower has of one text; `had`: how many characters of it somebody has already."""

    def __init__(self, had: int = 0) -> None:
        self.text = ""
        self._had = had
        self._tokens = 0

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

    def tokens(self, piece: Piece) -> tuple[Token, ...]:
        """What is new of a piece's tokens."""
        new = piece.tokens[max(0, self._tokens - piece.tokens_at) :]
        if piece.tokens_at > self._tokens:
            return ()
        self._tokens += len(new)
        return new

    def rest_of_tokens(self, result: Result) -> tuple[Token, ...]:
        """Those of the whole text that are left."""
        return (result.texts[0].tokens or ())[self._tokens :]

    def _more(self, new: str) -> str:
        before = len(self.text)
        self.text += new
        return new[max(0, self._had - before) :]
