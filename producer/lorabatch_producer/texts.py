"""The text of a job as it grows, for who follows it from Python.

What the broker does not bring, the result does. Raises JobNotFound, WaitTimeout, JobFailed,
JobCancelled, TextChanged.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import Any

import redis

from lorabatch import Result
from lorabatch.errors import TextChanged
from lorabatch.queue import plain_url
from lorabatch.streams import Followed, Piece, piece_of, stream_key
from lorabatch_producer.waiting import Watch, succeeded

__all__ = ["follow"]

REST_S = 1.0


def follow(broker_url: str, job_id: str, watch: Watch) -> Generator[str]:
    """Pieces of the text, each once; `watch`: the job. Ends when the job has. After each look an
    empty one, so that nobody is held for longer than a pause."""
    followed = Followed()
    ended: list[Result] = []
    with redis.Redis.from_url(plain_url(broker_url)) as client:
        stream = _Stream(client, job_id)
        while not ended:
            ended = watch.look()
            end_s = time.monotonic() + (0.0 if ended else watch.pause_s())
            for piece in stream.until(end_s):
                if new := followed.take(piece):
                    yield new
            yield ""
    result = succeeded(ended[0])
    rest = followed.rest(result.text or "")
    if rest is None:
        raise TextChanged(
            f"job {job_id!r} was run again and has another text than what came of it first; read "
            "the whole of it from its result"
        )
    if rest:
        yield rest


class _Stream:
    """Reads on from where it was."""

    def __init__(self, client: redis.Redis, job_id: str) -> None:
        self._client, self._job_id = client, job_id
        self._key = stream_key(job_id)
        self._last: Any = "0-0"

    def until(self, end_s: float) -> Iterator[Piece]:
        """What there is, and what comes until then; without the broker, nothing."""
        while True:
            left_s = end_s - time.monotonic()
            try:
                entries = self._read(left_s)
            except redis.RedisError:
                time.sleep(max(0.0, min(left_s, REST_S)))
                return
            for self._last, entry in entries:
                yield piece_of(self._job_id, entry)
            if left_s <= 0 and not entries:
                return

    def _read(self, left_s: float) -> list[Any]:
        block = max(1, round(left_s * 1000)) if left_s > 0 else None
        found: Any = self._client.xread({self._key: self._last}, block=block)
        return found[0][1] if found else []
