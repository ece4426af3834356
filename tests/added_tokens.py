"""Tokenizers with added tokens, as transformers writes them beside an adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

__all__ = ["add_tokens", "word_tokenizer", "write_tokenizer"]


def word_tokenizer(count: int) -> Any:
    """Of the words t0, t1, ..."""
    backend = Tokenizer(WordLevel({f"t{i}": i for i in range(count)}, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def add_tokens(tokenizer: Any, plain: Sequence[str], special: Sequence[str] = ()) -> Any:
    """The same, changed."""
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in plain])
    tokenizer.add_tokens([AddedToken(text, special=True) for text in special])
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Any, **fields: Any) -> None:
    """As save_pretrained does; `fields` stand in place of those of tokenizer.json."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
