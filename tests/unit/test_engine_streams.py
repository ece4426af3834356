"""The engine gives texts as they grow, of jobs that somebody follows."""

from __future__ import annotations

import pytest

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
