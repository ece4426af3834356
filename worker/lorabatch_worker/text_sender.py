"""Pieces of growing texts to the broker's streams. Loses them where the broker is away or full."""

from __future__ import annotations

import time
from collections.abc import Sequence

import redis
import structlog
from redis.backoff import NoBackoff
from redis.retry import Retry

from lorabatch.queue import plain_url
from lorabatch.streams import KEPT_S, LONGEST, Piece, entry_of, stream_key
from lorabatch_worker.retry import reason

__all__ = ["TextSender"]

log = structlog.get_logger(__name__)

REST_S = 5.0


class TextSender:
    """Used from one thread."""

    def __init__(self, broker_url: str) -> None:
        url, once = plain_url(broker_url), Retry(NoBackoff(), 0)
        self._client = redis.Redis.from_url(
            url, socket_connect_timeout=2, socket_timeout=2, retry=once
        )
        self._failed_s = -REST_S

    def send(self, pieces: Sequence[Piece]) -> None:
        """All at once. After a failure, nothing for REST_S."""
        if not pieces or time.monotonic() - self._failed_s < REST_S:
            return
        try:
            with self._client.pipeline(transaction=False) as pipe:
                for piece in pieces:
                    key = stream_key(piece.job_id)
                    pipe.xadd(key, entry_of(piece), maxlen=LONGEST)  # type: ignore[arg-type]
                    pipe.expire(key, KEPT_S)
                pipe.execute()
        except (redis.RedisError, OSError) as error:
            self._failed_s = time.monotonic()
            log.warning("texts not sent", error=reason(error))

    def close(self) -> None:
        self._client.close()
