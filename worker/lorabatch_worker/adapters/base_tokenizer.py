"""The base model's tokenizer, as an adapter's own is held against it.

Loaded when the first adapter ships one; kept of it are its tokens and how it splits text. A load
takes 0.2 to 0.3 s for 49,152 tokens on two cores, most of it without letting other threads run.
Used from one thread at a time. Raises what loading it raises.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

__all__ = ["BaseTokenizer", "tokenizer_bytes"]

PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
TOKEN_BYTES = 150  # measured with 49,152 tokens


class BaseTokenizer:
    """`load` makes a new one at each call; `file`: its tokenizer.json, if it has one."""

    def __init__(self, load: Callable[[], Any], file: Path | None = None) -> None:
        self.load = load
        self._file = file

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """Of all its tokens."""
        found: dict[str, int] = self.load().get_vocab()
        return found

    @cached_property
    def _known(self) -> list[dict[str, Any]]:
        from tokenizers import Tokenizer

        # transformers' classes build some parts anew; what it saves, and saved until 4, differ.
        texts = [self.load().backend_tokenizer.to_str()]
        if self._file is not None and self._file.is_file():
            texts += [self._file.read_text("utf-8"), Tokenizer.from_file(str(self._file)).to_str()]
        return [_parts(json.loads(text)) for text in texts]

    @property
    def max_length(self) -> int | None:
        """Tokens that it says a text may have: what most adapters say, too, who took it along."""
        length = getattr(self.load(), "model_max_length", None)
        return length if isinstance(length, int) else None

    @cached_property
    def tokens(self) -> Mapping[int, str]:
        return {number: token for token, number in self.ids.items()}

    @cached_property
    def size(self) -> int:
        """Token ids up to its last token."""
        return max(self.tokens) + 1

    def first_difference(self, fields: Mapping[str, Any]) -> str | None:
        """Which part of a tokenizer.json is not this one's, whichever library wrote it."""
        for part, theirs in _parts(fields).items():
            if not any(_same(theirs, ours[part]) for ours in self._known):
                return part
        return None


def _parts(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What decides how text is split and put together, besides the tokens."""
    model = fields.get("model") or {}
    merges = model.get("merges")
    kind = [model.get("type", "BPE"), len(merges) if isinstance(merges, list) else 0]
    return {**{part: fields.get(part) for part in PARTS}, "model": kind}


def _same(one: Any, other: Any) -> bool:
    """But for fields that only one of them has: versions of the library write more or fewer."""
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_same(one[name], other[name]) for name in one.keys() & other.keys())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def tokenizer_bytes(tokenizer: Any | None) -> int:
    """That a tokenizer takes in memory, about."""
    return 0 if tokenizer is None else TOKEN_BYTES * len(tokenizer)
