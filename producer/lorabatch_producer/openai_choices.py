"""Several texts of one OpenAI request, and log probabilities of their tokens: asked and answered.

`n`, `logit_bias`, and for a chat `logprobs` with `top_logprobs`; for a completion `best_of`, and
`logprobs` as a number, the most likely tokens to be told beside each. Log probabilities are the
model's own, before biases, penalties and temperature; end tokens have theirs, too. Raises
InvalidJob.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from typing import Any

from lorabatch.candidates import MAX_TOP_LOGPROBS
from lorabatch.errors import InvalidJob, shown
from lorabatch.result import LikelyToken, Token

__all__ = ["ASKED", "Logprobs", "choice_params", "only_one_streams"]

# field: what asks for nothing
ASKED: dict[bool, dict[str, object]] = {
    True: {"n": 1, "logit_bias": {}, "logprobs": False, "top_logprobs": 0},
    False: {"n": 1, "logit_bias": {}, "logprobs": False, "best_of": 1},
}
"""For a chat, and for a completion."""
STREAMED = {"n": 1, "best_of": 1}


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


class Logprobs:
    """Of one choice's tokens, all at once or as they come."""

    def __init__(self, chat: bool) -> None:
        self._chat = chat
        self._length = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def told(self, tokens: tuple[Token, ...] | None) -> dict[str, Any] | None:
        """The choice's `logprobs`."""
        if tokens is None:
            return None
        if self._chat:
            return {"content": [_content(token) for token in tokens], "refusal": None}
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_by_text(token) for token in tokens],
            "text_offset": [self._offset(token) for token in tokens],
        }

    def _offset(self, token: Token) -> int:
        """Where it begins, in characters of the text, which special tokens are no part of."""
        at = self._length
        if not token.special:
            self._length += len(self._decoder.decode(bytes(token.raw)))
        return at


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


def _same(value: object, nothing: object) -> bool:
    return type(value) is type(nothing) and value == nothing
