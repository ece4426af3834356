"""The texts of a job that has ended: which are kept, and what is told of them and their tokens.

A token's text is that of its bytes; half a character is U+FFFD there, and its bytes are told
beside it. Raises nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from collections.abc import Sequence as List
from functools import cache
from typing import Any

from lorabatch.result import Choice, LikelyToken, Token
from lorabatch_worker.sequence import Scored, Sequence
from lorabatch_worker.stop import decode, trim

__all__ = ["TokenTexts", "choice_of", "ranked"]

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
SPACE = "\u2581"  # SentencePiece's


def ranked(members: List[Sequence]) -> list[Sequence]:
    """All sequences of a job, what it keeps first: the best ones, or all in their order."""
    params = members[0].params
    if params.candidates == params.n:
        return list(members)
    return sorted(members, key=_mean_logprob, reverse=True)


def choice_of(sequence: Sequence, tokenizer: Any) -> Choice:
    """As it is told, of one that ended by itself."""
    text = decode(tokenizer, sequence.output)
    if sequence.finish_reason == "stop_sequence":
        text = trim(text, sequence.params.stop)
    tokens = None
    if sequence.params.logprobs:
        tokens = TokenTexts(tokenizer).scored(sequence.output, sequence.scores)
    return Choice(
        text=text,
        token_ids=tuple(sequence.output),
        finish_reason=sequence.finish_reason,
        seed=sequence.seed,
        tokens=tokens,
    )


class TokenTexts:
    """Texts of single tokens of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.added_tokens_decoder
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self._byte_level = decoder is not None and b"ByteLevel" in decoder.__getstate__()
        self._known: dict[int, dict[str, Any]] = {}

    def scored(self, ids: Iterable[int], scores: Iterable[Scored]) -> tuple[Token, ...]:
        """Tokens with their log probabilities, as a result tells them."""
        return tuple(self._scored(i, scored) for i, scored in zip(ids, scores, strict=True))

    def _scored(self, token_id: int, scored: Scored) -> Token:
        top = tuple(LikelyToken(**self.told(i), logprob=value) for i, value in scored.top)
        return Token(**self.told(token_id), logprob=scored.logprob, top=top)

    def told(self, token_id: int) -> dict[str, Any]:
        """Fields of a LikelyToken. The likely ones are the same again and again."""
        if token_id not in self._known:
            self._known[token_id] = self._fields(token_id)
        return self._known[token_id]

    def _fields(self, token_id: int) -> dict[str, Any]:
        raw = self._bytes(token_id)
        text = raw.decode(errors="replace").replace("\x00", "\ufffd")
        added = self._added.get(token_id)
        return {
            "token_id": token_id,
            "text": text,
            "special": added is not None and added.special,
            "utf8": None if text.encode() == raw else tuple(raw),
        }

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return str(self._added[token_id].content).encode()
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # an id of the model that the tokenizer lacks
            return b""
        if self._byte_level:
            letters = _letters()
            return bytes(letters[c] for c in token if c in letters)
        byte = BYTE.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else str(token).replace(SPACE, " ").encode()


def _mean_logprob(sequence: Sequence) -> float:
    values = [scored.logprob for scored in sequence.scores]
    return sum(values) / max(1, len(values))


@cache
def _letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones of Latin-1 stand for themselves, the others, in
    order, for what comes after it."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    shifted = {chr(256 + place): byte for place, byte in enumerate(others)}
    return {chr(byte): byte for byte in plain} | shifted
