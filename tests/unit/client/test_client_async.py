"""What only the awaitable client can do: sources that are awaited, and tasks that are cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis

from lorabatch import Ledger, Settings
from lorabatch.errors import InvalidJob
from lorabatch_producer import AsyncProducer
from lorabatch_producer.aio_flow import in_thread
from tests.played_worker import run_queued, working

WAIT_S = 30


@pytest.fixture
async def producer(settings: Settings) -> AsyncIterator[AsyncProducer]:
    async with AsyncProducer(settings) as made:
        yield made


async def prompts(count: int) -> AsyncIterator[dict[str, Any]]:
    for number in range(count):
        yield {"prompt": f"p{number}"}


async def test_a_source_may_wait_for_results(producer: AsyncProducer, ledger: Ledger) -> None:
    answers = asyncio.Queue[str]()

    async def story() -> AsyncIterator[dict[str, Any]]:
        yield {"prompt": "Once"}
        for _ in range(3):
            yield {"prompt": (await answers.get()).removeprefix("None: ") + "."}

    texts = []
    with working(ledger):
        async with asyncio.timeout(WAIT_S):
            async for result in producer.map(story()):
                texts.append(result.text)
                answers.put_nowait(str(result.text))
    assert texts == [f"None: Once{'.' * dots}" for dots in range(4)]


async def test_many_come_from_an_async_source(producer: AsyncProducer, ledger: Ledger) -> None:
    read = 0

    async def source() -> AsyncIterator[dict[str, Any]]:
        nonlocal read
        async for job in prompts(40):
            read += 1
            yield job

    ids = producer.enqueue_each(source(), max_in_flight=5)
    assert len([await anext(ids) for _ in range(5)]) == 5
    assert read <= 5 + 2, "one job ahead, and the one that waits to be"
    run_queued(ledger)
    await anext(ids)
    with working(ledger):
        assert len([job_id async for job_id in ids]) == 34
        assert len(await producer.enqueue_many(prompts(7))) == 7


async def test_a_slow_source_is_no_standstill_while_there_is_room(
    producer: AsyncProducer, ledger: Ledger
) -> None:
    async def source() -> AsyncIterator[dict[str, Any]]:
        yield {"prompt": "first"}
        await asyncio.sleep(0.5)
        yield {"prompt": "second"}

    ids = producer.enqueue_each(source(), max_in_flight=10, idle_timeout_s=0.1)
    assert len([job_id async for job_id in ids]) == 2


async def test_a_source_whose_own_task_is_cancelled_ends_the_call(
    producer: AsyncProducer, ledger: Ledger
) -> None:
    async def source() -> AsyncIterator[dict[str, Any]]:
        yield {"prompt": "first"}
        other = asyncio.create_task(asyncio.sleep(WAIT_S))
        other.cancel()
        await other

    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(5):
            await producer.enqueue_many(source())
    assert ledger.counts() == {"queued": 1}


async def test_an_async_source_that_fails(producer: AsyncProducer, ledger: Ledger) -> None:
    async def source(bad: Any) -> AsyncIterator[Any]:
        async for job in prompts(3):
            yield job
        if isinstance(bad, Exception):
            raise bad
        yield bad

    for bad, kind in ((OSError("gone"), OSError), ({"prompt": ""}, InvalidJob)):
        found = []
        with working(ledger), pytest.raises(kind) as caught:  # noqa: PT012
            async for result in producer.map(source(bad), ordered=True):
                found += [result.text]
        assert found == ["None: p0", "None: p1", "None: p2"]
        assert caught.value.__notes__[0].startswith("the first 3 jobs of this call are accepted")


async def test_a_task_that_is_cancelled_leaves_nothing_behind(
    producer: AsyncProducer, ledger: Ledger
) -> None:
    told, closed = list[str](), asyncio.Event()

    async def source() -> AsyncIterator[dict[str, Any]]:
        try:
            async for job in prompts(100):
                yield job
        finally:
            closed.set()

    async def follow() -> None:
        async for _ in producer.map(source(), max_in_flight=10, on_accepted=told.extend):
            pass

    tasks = [asyncio.create_task(follow()) for _ in range(3)]
    while len(told) < 30:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    for task in tasks:
        task.cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(end) for end in ends] == [asyncio.CancelledError] * 3
    pool: Any = producer.producer.ledger.engine.pool
    assert (closed.is_set(), pool.checkedout()) == (True, 0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert ledger.counts() == {"queued": 30} == {"queued": len(told)}


async def test_a_stream_that_is_cancelled_leaves_no_connection(
    producer: AsyncProducer, ledger: Ledger, valkey_url: str
) -> None:
    job_id = await producer.enqueue(prompt="a", stream=True)

    async def follow() -> None:
        async for _ in producer.stream(job_id):
            pass

    with redis.Redis.from_url(valkey_url) as server:

        def readers() -> int:
            known: Any = server.client_list()
            return sum(one["cmd"] == "xread" for one in known)

        task = asyncio.create_task(follow())
        async with asyncio.timeout(WAIT_S):
            while not readers():
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while readers():
                await asyncio.sleep(0.01)
    pool: Any = producer.producer.ledger.engine.pool
    assert pool.checkedout() == 0


async def test_who_is_cancelled_hears_of_it_when_the_call_has_ended() -> None:
    begun, go, ended = threading.Event(), threading.Event(), threading.Event()

    def call() -> None:
        begun.set()
        go.wait(WAIT_S)
        ended.set()
        raise OSError("nobody asks for it")

    task = asyncio.create_task(in_thread(call))
    assert await asyncio.to_thread(begun.wait, WAIT_S)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0.01)
    assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
