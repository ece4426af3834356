"""One look for all who wait: nobody is forgotten, and nobody who left is looked for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest
import sqlalchemy as sa

from lorabatch import Result
from lorabatch.errors import ServerStops
from lorabatch_producer.server.outcomes import Outcomes


class Looks:
    """A ledger of results by job id, and what was looked for."""

    def __init__(self) -> None:
        self.results: dict[str, Result] = {}
        self.asked: list[frozenset[str]] = []
        self.error: Exception | None = None
        self.looked = threading.Event()

    def __call__(self, job_ids: Sequence[str]) -> dict[str, Result]:
        self.asked.append(frozenset(job_ids))
        self.looked.set()
        if self.error is not None:
            raise self.error
        return {i: self.results[i] for i in job_ids if i in self.results}

    def end(self, job_id: str) -> Result:
        made = Result(job_id=job_id, tenant="t", adapter_id=None, state="succeeded", text=job_id)
        self.results[job_id] = made
        return made


async def test_many_wait_and_each_gets_its_own() -> None:
    looks = Looks()
    outcomes = Outcomes(looks)
    names = [f"j{n % 50}" for n in range(100)]  # each is waited for twice
    waits = [asyncio.create_task(outcomes.wait(name, 30)) for name in names]
    await asyncio.to_thread(looks.looked.wait, 20)
    wanted = [looks.end(name) for name in names]
    assert await asyncio.gather(*waits) == wanted
    assert max(map(len, looks.asked)) == 50
    await outcomes.close()


async def test_who_left_is_not_looked_for() -> None:
    looks = Looks()
    outcomes = Outcomes(looks)
    assert await outcomes.wait("gone", 0.01) is None
    left = asyncio.create_task(outcomes.wait("left", 30))
    stays = asyncio.create_task(outcomes.wait("left", 30))
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    looks.asked.clear()
    other = asyncio.create_task(outcomes.wait("other", 30))
    while not looks.asked or looks.asked[-1] != {"left", "other"}:
        await asyncio.sleep(0.005)
    looks.end("left")
    looks.end("other")
    assert (await stays) == looks.results["left"]
    assert (await other) == looks.results["other"]
    assert not outcomes._awaited
    await outcomes.close()


async def test_what_the_look_raises_is_raised_to_all_and_the_next_can_wait() -> None:
    looks = Looks()
    looks.error = OSError("the database is away")
    outcomes = Outcomes(looks)
    found = await asyncio.gather(
        outcomes.wait("a", 30), outcomes.wait("b", 30), return_exceptions=True
    )
    assert [type(error) for error in found] == [OSError, OSError]
    looks.error = None
    looks.end("a")
    assert await outcomes.wait("a", 30) == looks.results["a"]
    await outcomes.close()


async def test_closing_ends_the_waiting() -> None:
    outcomes = Outcomes(Looks())
    waits = asyncio.create_task(outcomes.wait("a", None))
    await asyncio.sleep(0.05)
    await outcomes.close()
    with pytest.raises(asyncio.CancelledError):
        await waits


async def test_a_database_that_is_away_for_a_while_ends_no_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lorabatch_producer.server.outcomes.REST_S", 0.01)
    looks = Looks()
    looks.error = sa.exc.OperationalError("SELECT", {}, OSError("refused"))
    outcomes = Outcomes(looks)
    waits = asyncio.create_task(outcomes.wait("a", 30))
    while len(looks.asked) < 3:
        await asyncio.sleep(0.005)
    looks.error = None
    wanted = looks.end("a")
    assert await waits == wanted
    await outcomes.close()


async def test_who_waits_when_it_stops_is_told() -> None:
    outcomes = Outcomes(Looks())
    waits = asyncio.create_task(outcomes.wait("a", 30))
    await asyncio.sleep(0.01)
    outcomes.stop()
    with pytest.raises(ServerStops, match="GET /jobs/a"):
        await waits
    with pytest.raises(ServerStops, match="GET /jobs/b"):
        await outcomes.wait("b", 30)
    await outcomes.close()
