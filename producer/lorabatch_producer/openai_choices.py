"""Several texts of one OpenAI request, and log probabilities of their tokens: asked and answered.

`n`, `logit_bias`, and for a chat `logprobs` with `top_logprobs`; for a completion `best_of`, and
`logprobs` as a number, the most likely tokens to be told beside each. Log probabilities are the
model's own, before biases, penalties and temperature; end tokens have theirs, too. Raises
InvalidJob.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping
from typing import Any

from lorabatch.candidates import MAX_TOP_LOGPROBS
from lorabatch.errors import InvalidJob, shown
from lorabatch.result import Choice, LikelyToken, Token

__all__ = ["ASKED", "choice_params", "logprobs_body", "only_one_streams"]

# field: what asks for nothing
ASKED: dict[bool, dict[str, object]] = {
    True: {"n": 1, "logit_bias": {}, "logprobs": False, "top_logprobs": 0},
    False: {"n": 1, "logit_bias": {}, "logprobs": False, "best_of": 1},
}
"""For a chat, and for a completion."""
STREAMED = {"n": 1, "best_of": 1, "logprobs": False}


def choice_params(given: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    """Fields of SamplingParams; those that ask for nothing are left out."""
    params = {
        name: given[name]
        for name, nothing in ASKED[chat].items()
        if name in given and not _same(given[name], nothing)
    }
    if chat or "logprobs" not in params:
        return params
    top = params["logprobs"]
    if type(top) is not int or not 0 <= top <= MAX_TOP_LOGPROBS:
        raise InvalidJob(
            f"body.logprobs: wanted a number from 0 to {MAX_TOP_LOGPROBS} (got {shown(top)})"
        )
    return {**params, "logprobs": True, "top_logprobs": top}


def only_one_streams(params: Mapping[str, Any]) -> None:
    """Refuse what a stream cannot tell."""
    for name, nothing in STREAMED.items():
        if name in params and not _same(params[name], nothing):
            raise InvalidJob(
                f"{name}: not supported with stream (got {shown(params[name])}); leave out either"
            )


def logprobs_body(chat: bool, choice: Choice) -> dict[str, Any] | None:
    """A choice's `logprobs`."""
    if choice.tokens is None:
        return None
    if chat:
        return {"content": [_content(token) for token in choice.tokens], "refusal": None}
    return {
        "tokens": [token.text for token in choice.tokens],
        "token_logprobs": [token.logprob for token in choice.tokens],
        "top_logprobs": [_by_text(token) for token in choice.tokens],
        "text_offset": list(_offsets(choice.tokens)),
    }


def _content(token: Token) -> dict[str, Any]:
    return {**_told(token), "top_logprobs": [_told(one) for one in token.top]}


def _told(token: LikelyToken) -> dict[str, Any]:
    return {"token": token.text, "bytes": token.raw, "logprob": token.logprob}


def _by_text(token: Token) -> dict[str, float]:
    """The most likely ones, and the one that was drawn."""
    found: dict[str, float] = {}
    for one in (*token.top, token):
        found.setdefault(one.text, one.logprob)
    return found


def _offsets(tokens: tuple[Token, ...]) -> Iterator[int]:
    """Where each begins, in characters of the text, which special tokens are no part of."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    length = 0
    for token in tokens:
        yield length
        if not token.special:
            length += len(decoder.decode(bytes(token.raw)))


def _same(value: object, nothing: object) -> bool:
    return type(value) is type(nothing) and value == nothing
