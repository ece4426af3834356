"""Delivers webhooks from the outbox, as many servers as there are, at least once each.

A delivery that was not answered with 2xx is tried again: after `webhook_retry_s`, then after three
times as long each time, up to LONGEST_S, until `webhook_max_attempts` or `webhook_max_age_s`; 410
ends it at once. Each pause is shortened at random by up to a half, so that what failed together
does not come back together. To one host go `webhook_per_host` at a time, and one alone after it did
not answer. Errors that are no receiver's are logged, and it goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import structlog

from lorabatch import Ledger, Settings
from lorabatch.logs import trace
from lorabatch.outbox import Outbox
from lorabatch.webhook_secrets import Secrets
from lorabatch_producer.webhook_events import bodies
from lorabatch_producer.webhook_post import Answer, Poster, PostFailed
from lorabatch_producer.webhooks import ID, SIGNATURE, TIMESTAMP, signature

__all__ = ["WebhookSender", "pause_s"]

log = structlog.get_logger(__name__)

LOOK_S = 0.5
AFTER_ERROR_S = 5.0
TIDY_S = 3600.0
LONGEST_S = 21_600.0
LONGEST_WISH_S = 86_400.0  # of a receiver's Retry-After
GONE = 410


class WebhookSender:
    """`async with WebhookSender(ledger, settings)`: in the background. Used from one event loop."""

    def __init__(self, ledger: Ledger, settings: Settings) -> None:
        self._ledger = ledger
        self._outbox = Outbox(ledger.engine)
        self._settings = settings
        self._busy = Counter[str]()
        self._silent = set[str]()
        self._sending = set[asyncio.Task[None]]()
        self._posting = set[asyncio.Task[Answer]]()
        self._stopping = False
        self._ended = asyncio.Event()
        self._tidied_s = float("-inf")
        self._running: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        s = self._settings
        if s.webhook_senders:
            ca_file = s.webhook_ca
            self._poster = Poster(s.outgoing_rules, s.webhook_timeout_s, s.webhook_senders, ca_file)
            self._running = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """What is being sent is broken off, and another's at once. What asks the database is waited
        for: a thread cannot be broken off."""
        if self._running is None:
            return
        self._stopping = True
        self._ended.set()
        await self._running
        for post in self._posting:
            post.cancel()
        await asyncio.gather(*self._sending)
        self._poster.close()

    async def _run(self) -> None:
        while not self._stopping:
            self._ended.clear()
            try:
                taken = await self._take()
                wait_s = LOOK_S
            except Exception as error:  # noqa: BLE001 - whatever it is, it is tried again
                log.error("webhooks cannot be looked for", trace=trace(error))
                taken, wait_s = False, AFTER_ERROR_S
            if taken or self._stopping:
                continue
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), wait_s)

    async def _take(self) -> bool:
        """Begin what is due, as far as there is room for it: whether there was any."""
        free = self._settings.webhook_senders - len(self._sending)
        if free <= 0:
            return False
        if time.monotonic() - self._tidied_s > TIDY_S:
            self._tidied_s = time.monotonic()
            await asyncio.to_thread(self._outbox.tidy)
        lease_s = self._settings.webhook_timeout_s + self._settings.lease_s
        rows = await asyncio.to_thread(self._outbox.take, free, self._room, lease_s)
        if not rows:
            return False
        said = await asyncio.to_thread(bodies, self._ledger, rows)
        for row in rows:
            self._busy[row.host] += 1
            task = asyncio.create_task(self._send(row, said.get(row.webhook_id)))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        return True

    def _room(self, host: str) -> int:
        most = 1 if host in self._silent else self._settings.webhook_per_host
        return most - self._busy[host]

    async def _send(self, row: Any, body: bytes | None) -> None:
        try:
            await self._attempt(row, body)
        except Exception as error:  # noqa: BLE001 - its lease runs out
            log.error("webhook not sent", webhook_id=row.webhook_id, trace=trace(error))
        finally:
            self._busy[row.host] -= 1
            if not self._busy[row.host]:
                del self._busy[row.host]
            self._ended.set()

    async def _attempt(self, row: Any, body: bytes | None) -> None:
        if body is None:
            await self._give_up(
                row, None, f"what it tells of, {row.subject!r}, is not there any more"
            )
            return
        headers = await asyncio.to_thread(self._headers, row, body)
        if headers is None:
            await self._failed(row, None, "the tenant has no secret to sign it with")
            return
        post = asyncio.create_task(self._poster.post(row.url, headers, body))
        self._posting.add(post)
        if self._stopping:
            post.cancel()
        try:
            answer = await post
        except asyncio.CancelledError:
            await asyncio.to_thread(self._outbox.again, row, 0.0, None, "its sender was stopped")
            return
        except PostFailed as error:
            self._silent.add(row.host)
            await self._failed(row, None, str(error))
            return
        finally:
            self._posting.discard(post)
        self._silent.discard(row.host)
        if 200 <= answer.status < 300:
            await asyncio.to_thread(self._outbox.end, row, "delivered", answer.status, None)
        elif answer.status == GONE:
            await self._give_up(row, answer, "the receiver answered 410: it wants no more of it")
        else:
            await self._failed(row, answer, f"the receiver answered {answer.status}")

    def _headers(self, row: Any, body: bytes) -> Mapping[str, str] | None:
        known = Secrets(self._ledger.engine).list(row.tenant)
        at_s = int(time.time())
        signatures = [
            signature(one.secret, row.webhook_id, at_s, body) for one in known if one.valid
        ]
        if not signatures:
            return None
        return {
            "Content-Type": "application/json",
            ID: row.webhook_id,
            TIMESTAMP: str(at_s),
            SIGNATURE: " ".join(signatures),
        }

    async def _failed(self, row: Any, answer: Answer | None, why: str) -> None:
        """To be tried again, if it may."""
        s = self._settings
        wish_s = answer.retry_after_s or 0.0 if answer else 0.0
        in_s = max(min(LONGEST_WISH_S, wish_s), pause_s(row.attempts, s.webhook_retry_s))
        age_s = await asyncio.to_thread(self._outbox.age_s, row)
        if row.attempts >= s.webhook_max_attempts or age_s + in_s > s.webhook_max_age_s:
            await self._give_up(row, answer, why)
            return
        status = answer.status if answer else None
        await asyncio.to_thread(self._outbox.again, row, in_s, status, why)

    async def _give_up(self, row: Any, answer: Answer | None, why: str) -> None:
        log.warning("webhook given up", webhook_id=row.webhook_id, attempts=row.attempts, why=why)
        status = answer.status if answer else None
        await asyncio.to_thread(self._outbox.end, row, "failed", status, why)


def pause_s(attempts: int, first_s: float) -> float:
    """After so many attempts: between half of it and all of it."""
    longest = min(LONGEST_S, first_s * 3.0 ** min(attempts - 1, 20))
    return longest * random.uniform(0.5, 1.0)
