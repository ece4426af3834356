"""Bad tokenizers, and added tokens that do not fit their rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lorabatch.errors import InvalidAdapter, LoraBatchError, UnsupportedAdapter
from tests.added_tokens import add_tokens, word_tokenizer, write_tokenizer
from tests.bad_adapters.good import PREFIX, VOCABULARY, WIDTH, write
from tests.bad_adapters.making import Bad, with_file

TOKENS = "tokenizer.json"
EMBEDDING, HEAD = f"{PREFIX}model.embed_tokens.weight", f"{PREFIX}lm_head.weight"
TRAINED = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"


def grown(
    rows: int = 11, head: int | None = None, new: str | None = "<a> <b>", **fields: Any
) -> Callable[[Path], None]:
    """An adapter of `rows` tokens whose tokenizer adds the words of `new`; None: it ships none."""

    def make(folder: Path) -> None:
        count = rows if head is None else head
        write(folder, {}, {EMBEDDING: torch.ones(rows, WIDTH), HEAD: torch.ones(count, WIDTH)})
        if new is not None:
            write_tokenizer(folder, add_tokens(word_tokenizer(VOCABULARY), new.split()), **fields)

    return make


def trained(ids: list[int]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write(folder, {"trainable_token_indices": ids}, {TRAINED: torch.ones(len(ids), WIDTH)})

    return make


def row(what: str, *words: str, error: type[LoraBatchError] = InvalidAdapter, **fields: Any) -> Bad:
    return Bad(what, grown(**fields), error, words)


def listed(what: str, item: Any, *words: str) -> Bad:
    """One odd item in added_tokens."""
    return row(what, TOKENS, "added_tokens", *words, added_tokens=[item])


def entry(token: int, text: Any, **flags: Any) -> dict[str, Any]:
    return {"id": token, "content": text, "special": False, **flags}


RENAMED = {"type": "WordLevel", "vocab": {f"t{i}".replace("3", "x"): i for i in range(9)}}
MORE = {"type": "WordLevel", "vocab": {f"t{i}": i for i in range(11)}}
SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False}

TOKENS_ROWS: list[Bad] = [
    row("added rows and no tokenizer", TOKENS, "missing", "rows of 11 tokens", "of 9", new=None),
    row("the base's own tokenizer", "rows of 11 tokens", "has 9", new=""),
    row("too few rows", TOKENS, "'<c>' as token 11", "rows of 11 tokens", new="<a> <b> <c>"),
    row("too many rows", "rows of 13 tokens", "has 11", "multiple of 8", rows=13),
    row("a thousand rows of padding", "rows of 1032 tokens", "has 11", rows=1032),
    row("100,000 added rows", "100009", "at most 32768", rows=100_009),
    row("other rows of the head", EMBEDDING, HEAD, "11", "12", "both ends", head=12),
    row("fewer rows than the base has tokens", TOKENS, "missing", "of 9", rows=8, new=None),
    row("fewer rows than the tokenizer has tokens", "'<a>' as token 9", "rows of 8", rows=8),
    row("another vocabulary", TOKENS, "'t3' is token None, wanted 3", model=RENAMED),
    row(
        "a vocabulary grown in the tokenizer's model",
        "'t10'",
        "only added_tokens",
        error=UnsupportedAdapter,
        model=MORE,
        added_tokens=[entry(9, "t9")],
    ),
    row("a vocabulary that is a text", TOKENS, "no vocab", model={"vocab": "t0"}),
    row(
        "another way to split text, with a slow pattern",
        "pre_tokenizer is not the base tokenizer's",
        error=UnsupportedAdapter,
        pre_tokenizer=SPLIT,
    ),
    row(
        "ids with a gap",
        "'<b>' is token 11, wanted 10",
        rows=12,
        added_tokens=[entry(9, "<a>"), entry(11, "<b>")],
    ),
    row(
        "an added token that the base has",
        "'t4' is token 9, wanted 4",
        rows=10,
        added_tokens=[entry(9, "t4")],
    ),
    listed("an added token without an id", {"content": "<a>"}, "'<a>'"),
    listed("an added token whose id is true", entry(True, "<a>"), "'<a>'"),
    listed("an added token that is a number", entry(9, 7), "holds 7"),
    listed("an added token without text", entry(9, ""), "holds ''"),
    listed("an added token of 257 characters", entry(9, "x" * 257), "1 to 256 characters"),
    listed("an added token that is no text", entry(9, "\ud800"), "holds"),
    listed("an added token with an odd flag", entry(9, "<a>", lstrip="yes"), "'<a>'"),
    listed("an added token that is a list", [], "a list of 0"),
    row("one id twice", "id 9 twice", added_tokens=[entry(9, "<a>"), entry(9, "<b>")]),
    row("added tokens that are no list", "added_tokens is 7", added_tokens=7),
    Bad("trained rows of added tokens alone", trained([9]), InvalidAdapter, (TOKENS, "missing")),
    Bad(
        "trained rows of some added tokens",
        trained([3, 10]),
        UnsupportedAdapter,
        ("for 11 tokens", "no row of model.embed_tokens for token 9"),
    ),
    Bad("tokenizer broken", with_file(TOKENS, "{"), InvalidAdapter, (TOKENS, "JSON object")),
    Bad("tokenizer is a list", with_file(TOKENS, "[]"), InvalidAdapter, (TOKENS, "JSON object")),
    Bad(
        "tokenizer deep",
        with_file(TOKENS, '{"a": ' + "[" * 200_000),
        InvalidAdapter,
        (TOKENS, "JSON object"),
    ),
    Bad("tokenizer not UTF-8", with_file(TOKENS, b"\xff\xfe"), InvalidAdapter, (TOKENS, "UTF-8")),
    Bad(
        "tokenizer over 48 MiB",
        with_file(TOKENS, b"{}" + b" " * (48 << 20)),
        InvalidAdapter,
        (TOKENS, "over", "bytes"),
    ),
    Bad(
        "tokenizer of millions of lists",
        with_file(TOKENS, b'{"a":[' + b"[]," * 4_000_000),
        InvalidAdapter,
        (TOKENS, "values", "allowed"),
    ),
]
