"""The client, blocking and awaitable, called in the same way by the same tests."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from typing import Any

import pytest

from lorabatch import Ledger, Settings
from lorabatch.database import open_database
from lorabatch_producer import AsyncProducer, Producer


class Blocking:
    """An AsyncProducer that is called like a Producer."""

    def __init__(self, producer: AsyncProducer) -> None:
        self._producer = producer
        self._runner = asyncio.Runner()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._producer, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            found = method(*args, **kwargs)
            if inspect.isasyncgen(found):
                return self._each(found)
            return self._runner.run(found)

        return call

    def _each(self, found: Any) -> Iterator[Any]:
        async def following() -> Any:
            return await anext(found, None)

        while (item := self._runner.run(following())) is not None:
            yield item

    def end(self) -> None:
        self.close()
        self._runner.close()


@pytest.fixture(params=["sync", "async"])
def make(request: pytest.FixtureRequest) -> Iterator[Any]:
    made: list[Any] = []

    def build(settings: Settings) -> Any:
        sync = request.param == "sync"
        made.append(Producer(settings) if sync else Blocking(AsyncProducer(settings)))
        return made[-1]

    yield build
    for producer in made:
        producer.close() if isinstance(producer, Producer) else producer.end()


@pytest.fixture
def producer(make: Any, settings: Settings) -> Any:
    return make(settings)


@pytest.fixture
def ledger(settings: Settings) -> Iterator[Ledger]:
    engine = open_database(settings)
    yield Ledger(engine)
    engine.dispose()
