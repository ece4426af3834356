"""The engine gives texts as they grow, of jobs that somebody follows."""

from __future__ import annotations

from typing import Any

import pytest

from lorabatch.result import Token
from lorabatch.streams import Followed
from tests.desk import Desk, job, leave_nothing

ADAPTERS = (None, "all", "dora", "embedding")


@pytest.mark.parametrize("stop", [(), ("e", " t")])
def test_pieces_are_the_beginning_of_the_text(own: Desk, stop: tuple[str, ...]) -> None:
    jobs = {
        f"{adapter}-{streamed}": job(
            f"{adapter}-{streamed}", adapter=adapter, max_new_tokens=24, stop=stop
        ).model_copy(update={"stream": streamed})
        for adapter in ADAPTERS
        for streamed in (True, False)
    }
    results = own.run(*jobs.values())
    own.engine.drain(0)  # the last pieces come before it ends
    followed = {name: Followed() for name in jobs}
    for piece in own.pieces:
        assert piece.at == len(followed[piece.job_id].text), "none is missing, none comes twice"
        followed[piece.job_id].take(piece)
    for name, one in followed.items():
        text = results[name].text or ""
        if jobs[name].stream:
            assert text.startswith(one.text)
            assert len(text) - len(one.text) <= 8, "all of it but what may yet change"
        else:
            assert one.text == ""
    assert any(one.text for one in followed.values())
    leave_nothing(own.engine)


def test_tokens_come_with_their_text(own: Desk) -> None:
    plain = {"max_new_tokens": 24, "logprobs": True, "top_logprobs": 2}
    ways: dict[str, dict[str, Any]] = {
        "greedy": {},
        "hot": {"temperature": 1.5, "seed": 3},
        "stop": {"stop": ("e", " t")},
        "untold": {"logprobs": False, "top_logprobs": 0},
    }
    jobs = {
        name: job(name, adapter="all", **{**plain, **way}).model_copy(update={"stream": True})
        for name, way in ways.items()
    }
    results = own.run(*jobs.values())
    own.engine.drain(0)
    followed = {name: Followed() for name in jobs}
    tokens: dict[str, list[Token]] = {name: [] for name in jobs}
    for piece in own.pieces:
        tokens[piece.job_id] += followed[piece.job_id].tokens(piece)
        assert followed[piece.job_id].take(piece)
        assert len(tokens[piece.job_id]) == piece.tokens_at + len(piece.tokens)
    for name, one in followed.items():
        whole = results[name].texts[0].tokens
        if name == "untold":
            assert (whole, tokens[name]) == (None, [])
            continue
        assert whole is not None
        assert tokens[name], "not all of them at the end"
        assert (*tokens[name], *one.rest_of_tokens(results[name])) == whole
        assert all(len(told.top) == 2 for told in whole)
