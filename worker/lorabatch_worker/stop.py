"""Stop strings, found in the text as it grows, across token borders.

Only the tail that can hold a new match is decoded again at each token. The text of a
finished sequence is always one decode of all its tokens, so that it does not depend on how
it was watched. Special tokens are not part of the text and cannot be matched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["StopWatch", "decode", "trim"]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Plain text of token ids: no special tokens, no clean-up of spaces."""
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


def trim(text: str, stop: Sequence[str]) -> str:
    """Text up to the first place where any stop string begins."""
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    return text[: min(found)] if found else text


class StopWatch:
    """Tells when a stop string is complete in one sequence's output."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        added = tokenizer.added_tokens_decoder
        self._special = frozenset(i for i, token in added.items() if token.special)
        self._ids: list[int] = []
        # A token that is not special has at least one byte, so a match that ends in the newest
        # one lies in this many; one more, because some tokenizers trim the first one's space.
        self._window = max(len(s.encode()) for s in stop) + 1

    def saw(self, token: int) -> bool:
        """Take the next token: whether it completed a stop string."""
        if token in self._special or self._tokenizer.convert_ids_to_tokens(token) is None:
            return False  # no text: special, or an id of the model that the tokenizer lacks
        self._ids.append(token)
        text = decode(self._tokenizer, self._ids[-self._window :])
        if not any(s in text for s in self._stop):
            return False
        whole = decode(self._tokenizer, self._ids)
        return any(s in whole for s in self._stop)
