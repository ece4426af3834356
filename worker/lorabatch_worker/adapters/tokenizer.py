"""The tokenizer that an adapter ships: the base model's with tokens of its own, or not used.

An adapter that adds tokens brings tokenizer.json as transformers writes it. Its tokens are added to
a tokenizer of the base's, after a check that all else in the file is the base's, so that no pattern
and no code of whoever trained it runs here. A file that adds nothing is not used; of such a file
only what stands before its vocabulary is parsed.

Raises InvalidAdapter, UnsupportedAdapter. Not covered: files of SentencePiece; a vocabulary that
has grown within the tokenizer's model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorabatch.errors import InvalidAdapter, UnsupportedAdapter, shown
from lorabatch_worker.adapters.base_tokenizer import BaseTokenizer
from lorabatch_worker.adapters.template import TOKENIZER, is_unicode, read_object

__all__ = ["TOKENS", "read_tokenizer"]

TOKENS = "tokenizer.json"
MAX_BYTES = 48 << 20
MAX_VALUES = 4_000_000  # a text of 48 MiB can say 16,000,000 empty lists, which take 1 GiB
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
MAX_TOKEN_CHARS = 256
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
PADDING, MULTIPLE = 512, 8  # rows without a token, as resize_token_embeddings pads them
INSTEAD = (
    "put the tokenizer.json that save_pretrained of the base's tokenizer, with the tokens added, "
    "writes beside the adapter"
)


@dataclass(frozen=True)
class NewToken:
    """One of added_tokens."""

    id: int
    text: str
    flags: Mapping[str, bool] = field(default_factory=dict)


def read_tokenizer(
    folder: Path, base: BaseTokenizer | None, size: int | None, base_size: int | None
) -> Any | None:
    """The base's tokenizer with the adapter's tokens, None if it adds none. `size` and `base_size`:
    token ids that the adapter's and the base model's embedding have rows for."""
    resized = size != base_size
    if base is None or size is None or base_size is None:
        if resized:
            raise UnsupportedAdapter("not supported: added tokens, without the base's tokenizer")
        return None
    path = folder / TOKENS
    if not path.is_file():
        if size > base_size or size < (base.size if resized else 0):
            raise InvalidAdapter(
                f"it has rows of {size} tokens, the base model of {base_size} and its tokenizer of "
                f"{base.size}, but {TOKENS} is missing: {INSTEAD}"
            )
        return None
    text = _text(path)
    settings = read_object(folder / TOKENIZER)
    added = _added_tokens(_parsed(text, whole=False))
    new = [token for token in added if token.id not in base.tokens]
    new = _with_rows(new, size, None if resized else _named(settings, "pad_token"))
    if not new and not resized:
        return None
    fields = _parsed(text, whole=True)
    _check_vocabulary(_vocabulary(fields), added, new, base)
    _check_size(size, max(base.size, base_size, *(token.id + 1 for token in new)))
    odd = base.first_difference(fields)
    if odd:
        raise UnsupportedAdapter(
            f"{TOKENS}: {odd} is not the base tokenizer's; only added tokens are supported, so "
            f"{INSTEAD}"
        )
    return _made(new, settings, base) if new else None


def _made(new: list[NewToken], settings: Mapping[str, Any], base: BaseTokenizer) -> Any:
    from tokenizers import AddedToken

    tokenizer = base.load()
    ordered = sorted(new, key=lambda token: token.id)
    tokenizer.add_tokens([AddedToken(token.text, **token.flags) for token in ordered])
    for token in ordered:
        got = tokenizer.convert_tokens_to_ids(token.text)
        if got != token.id:
            raise InvalidAdapter(
                f"{TOKENS}: {shown(token.text)} is token {token.id}, wanted {shown(got)}, the next "
                "one that the base's tokenizer would give"
            )
    known = tokenizer.get_vocab()
    for name in SPECIAL:
        special = _named(settings, f"{name}_token")
        if special in known:
            setattr(tokenizer, f"{name}_token", special)
    return tokenizer


# -- the file ------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InvalidAdapter(f"{TOKENS} is over {MAX_BYTES} bytes")
        text = path.read_text("utf-8")
    except OSError as error:
        raise InvalidAdapter(f"{TOKENS} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidAdapter(f"{TOKENS} is not UTF-8 text: {error}") from None
    values = text.count("[") + text.count("{") + text.count('"') // 2
    if values > MAX_VALUES:
        raise InvalidAdapter(f"{TOKENS} holds {values} values, allowed {MAX_VALUES}")
    return text


def _parsed(text: str, whole: bool) -> dict[str, Any]:
    """The fields of the file, or those before the first that is large."""
    try:
        found = json.loads(text) if whole else _before_model(text)
    except (ValueError, IndexError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InvalidAdapter(f"{TOKENS} is not a valid JSON object")
    return found


def _before_model(text: str) -> dict[str, Any]:
    """Its fields as far as "model", which holds the vocabulary, and is the last one in what the
    tokenizers library writes. IndexError where the text ends."""
    decoder, found = json.JSONDecoder(), dict[str, Any]()
    at = _expect(text, 0, "{")
    while True:
        name, at = decoder.raw_decode(text, _skip(text, at))
        at = _skip(text, _expect(text, at, ":"))
        if name == "model" and "added_tokens" in found:
            return found
        found[name], at = decoder.raw_decode(text, at)
        at = _skip(text, at)
        if text[at] == "}":
            return found
        at = _expect(text, at, ",")


def _skip(text: str, at: int) -> int:
    while text[at].isspace():
        at += 1
    return at


def _expect(text: str, at: int, mark: str) -> int:
    at = _skip(text, at)
    if text[at] != mark:
        raise ValueError(f"wanted {mark}")
    return at + 1


def _added_tokens(fields: Mapping[str, Any]) -> list[NewToken]:
    listed = fields.get("added_tokens") or []
    if not isinstance(listed, list):
        raise InvalidAdapter(f"{TOKENS}: added_tokens is {shown(listed)}, wanted a list")
    found: dict[int, NewToken] = {}
    for item in listed:
        token = _added_token(item)
        if token is None:
            seen = item.get("content") if isinstance(item, dict) else item
            raise InvalidAdapter(
                f"{TOKENS}: added_tokens holds {shown(seen)}, wanted an id, a content of 1 to "
                f"{MAX_TOKEN_CHARS} characters, and flags"
            )
        if token.id in found:
            raise InvalidAdapter(f"{TOKENS}: added_tokens has id {token.id} twice")
        found[token.id] = token
    return list(found.values())


def _added_token(item: object) -> NewToken | None:
    if not isinstance(item, dict):
        return None
    number, text = item.get("id"), item.get("content")
    flags = {name: item[name] for name in FLAGS if name in item}
    if type(number) is not int or number < 0 or not isinstance(text, str):
        return None
    if not 0 < len(text) <= MAX_TOKEN_CHARS or not is_unicode(text):
        return None
    if not all(type(flag) is bool for flag in flags.values()):
        return None
    return NewToken(number, text, flags)


def _vocabulary(fields: Mapping[str, Any]) -> dict[str, int]:
    """Of its model: an object of ids, or a list of tokens and scores."""
    model = fields.get("model")
    found = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(found, list) and all(isinstance(one, list) and one for one in found):
        found = {str(one[0]): number for number, one in enumerate(found)}
    if not isinstance(found, dict):
        raise InvalidAdapter(f"{TOKENS}: its model has no vocab that is an object or a list")
    return found


def _named(settings: Mapping[str, Any], name: str) -> str | None:
    value = settings.get(name)
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


# -- checks --------------------------------------------------------------------


def _with_rows(new: list[NewToken], size: int, unused: str | None) -> list[NewToken]:
    """Those that the adapter has rows for, which must be all but `unused`: a token for padding is
    often added and never trained."""
    beyond = [token for token in new if token.id >= size]
    for token in beyond:
        if token.text != unused:
            raise InvalidAdapter(
                f"{TOKENS} has {shown(token.text)} as token {token.id}, but there are rows of "
                f"{size} tokens; wanted an embedding and a head for all of its tokens: save both "
                "after resize_token_embeddings (save_embedding_layers=True or modules_to_save)"
            )
    return [token for token in new if token.id < size]


def _check_vocabulary(
    model: Mapping[str, int], added: list[NewToken], new: list[NewToken], base: BaseTokenizer
) -> None:
    theirs = {**model, **{token.text: token.id for token in added}}
    for token, number in base.ids.items():
        if theirs.get(token) != number:
            raise InvalidAdapter(
                f"{TOKENS}: {shown(token)} is token {shown(theirs.get(token))}, wanted {number} as "
                "in the base's tokenizer: was it made from another one?"
            )
    more = theirs.keys() - base.ids.keys() - {token.text for token in added}
    if more:
        raise UnsupportedAdapter(
            f"{TOKENS}: the vocabulary of its model has {shown(min(more))}, which the base's does "
            "not have; only added_tokens are supported"
        )


def _check_size(size: int, needed: int) -> None:
    if size > needed and (size % MULTIPLE or size - needed >= PADDING):
        raise InvalidAdapter(
            f"it has rows of {size} tokens, but {TOKENS} has {needed}; wanted as many, or padding "
            f"up to a multiple of {MULTIPLE}: {INSTEAD}"
        )
