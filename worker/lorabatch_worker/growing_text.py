"""Texts as they grow, for jobs that somebody follows: decoded beside the engine, piece by piece.

A piece is text that will stay: whole characters, and nothing that may yet turn out to be part of a
stop string; with it come the tokens since the last one, where they have log probabilities. The text
of the result is decoded at once from all tokens (stop.py); a tokenizer whose pieces differ from
that shows up at whoever compares them.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import structlog

from lorabatch.streams import Piece
from lorabatch_worker.choices import TokenTexts
from lorabatch_worker.sequence import Sequence as Job
from lorabatch_worker.stop import decode, trim

__all__ = ["GrowingText", "GrowingTexts"]

log = structlog.get_logger(__name__)

HALF = "\ufffd"  # of a character whose other bytes have not come


class GrowingText:
    """Of one sequence."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._texts: TokenTexts | None = None
        self._stop = tuple(stop)
        self._held = max((len(s) for s in stop), default=1) - 1
        self._begin = self._read = 0
        self._open = ""
        self._over = False
        self.length = 0
        """Characters given so far."""
        self._told = 0
        """Tokens given so far."""

    def piece(self, sequence: Job) -> Piece:
        """What its output has grown by."""
        ids = list(sequence.output)
        at, told, text = self.length, self._told, self.more(ids)
        scored = sequence.scores[told : len(ids)] if text else []
        if not scored:
            return Piece(sequence.job_id, at, text)
        self._told += len(scored)
        self._texts = self._texts or TokenTexts(self._tokenizer)
        tokens = self._texts.scored(ids[told : self._told], scored)
        return Piece(sequence.job_id, at, text, told, tokens)

    def more(self, ids: Sequence[int]) -> str:
        """The text that the output has grown by, of all token ids up to now."""
        if self._over:
            return ""
        known = decode(self._tokenizer, ids[self._begin : self._read])
        text = decode(self._tokenizer, ids[self._begin :])
        if text.endswith(HALF) or len(text) <= len(known):
            return ""
        self._begin, self._read = self._read, len(ids)
        self._open += text[len(known) :]
        whole = trim(self._open, self._stop)
        self._over = len(whole) < len(self._open)
        sure = whole if self._over else whole[: len(whole) - self._held]
        self._open = self._open[len(sure) :]
        self.length += len(sure)
        return sure


class GrowingTexts:
    """A thread that takes what the engine generated and gives `on_text` pieces."""

    def __init__(
        self, tokenizer_of: Callable[[Job], Any], on_text: Callable[[Sequence[Piece]], None]
    ) -> None:
        self._tokenizer_of = tokenizer_of
        self._on_text = on_text
        self._grown: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._texts: WeakKeyDictionary[Job, GrowingText] = WeakKeyDictionary()
        self._thread = threading.Thread(target=self._run, name="texts", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def grew(self, sequence: Job) -> None:
        """It has another token. From the engine's thread."""
        self._grown.put(sequence)

    def close(self) -> None:
        self._grown.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while (first := self._grown.get()) is not None:
            grown = {first: None}
            over = False
            while not (over or self._grown.empty()):
                one = self._grown.get()
                over = one is None
                if one is not None:
                    grown[one] = None
            pieces = [piece for sequence in grown if (piece := self._piece(sequence)).text]
            try:
                self._on_text(pieces)
            except Exception as error:  # noqa: BLE001 - or the engine's tokens would pile up here
                log.warning("texts not sent", error=type(error).__name__)
            if over:
                return

    def _piece(self, sequence: Job) -> Piece:
        text = self._texts.get(sequence)
        if text is None:
            text = GrowingText(self._tokenizer_of(sequence), sequence.params.stop)
            self._texts[sequence] = text
        try:
            return text.piece(sequence)
        except Exception as error:  # noqa: BLE001 - a hint: others go on, and the result has it all
            log.warning("text not sent", job_id=sequence.job_id, error=type(error).__name__)
            return Piece(sequence.job_id, text.length, "")
