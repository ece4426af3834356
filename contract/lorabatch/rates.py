"""How much of a tenant's the HTTP API accepts in a minute, all servers together.

Counted in the database, where limits and jobs are, in one row a tenant, by the database's clock: a
server that counts holds the row, so that two cannot both give the last place away, and the broker
may be down while jobs are accepted. A minute is the clock's: around its end two minutes'
worth may come at once. What was counted stays counted if the job is refused afterwards. Only
tenants with a limit cost anything. Raises what the database raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import sqlalchemy as sa

from lorabatch.database import now_us
from lorabatch.errors import RateLimited
from lorabatch.job import Job
from lorabatch.statements import insert
from lorabatch.tables import tenant_minutes, tenants
from lorabatch.tenants import EACH
from lorabatch.tools import tools_bytes

__all__ = ["Minute", "Rate", "Rates", "estimated_tokens", "rate_of"]

MINUTE_US = 60_000_000
CHARS_PER_TOKEN = 4


class Rate(NamedTuple):
    """At most this much a minute; None: any number."""

    requests: int | None = None
    tokens: int | None = None


class Minute(NamedTuple):
    """A tenant's minute after a request for `asked_tokens` was counted, or not `granted`."""

    tenant: str
    rate: Rate
    asked_tokens: int
    granted: bool
    requests: int
    tokens: int
    left_s: float

    def refusal(self) -> RateLimited:
        """The error for who was not granted."""
        most, what = self.rate.requests, "requests"
        taken = f"{self.requests:,} came in this one"
        never = most == 0
        if most is None or self.requests < most:
            most, what = self.rate.tokens or 0, "tokens"
            taken = (
                f"{self.tokens:,} are taken in this one, and this may take {self.asked_tokens:,}"
            )
            never = self.asked_tokens > most
        when = "it will never fit" if never else f"come again in {self.left_s:.0f} s"
        return RateLimited(
            f"tenant {self.tenant!r}: {most:,} {what} a minute, {taken}: {when}, or raise the "
            f"limit with `lorabatch tenants set {self.tenant} --{what}-per-minute N`"
        )


class Rates:
    """Safe for many processes."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def limits(self) -> dict[str, Rate]:
        """Of those that something was said of."""
        columns = tenants.c.requests_per_minute, tenants.c.tokens_per_minute
        limited = sa.or_(*(column.is_not(None) for column in columns))
        with self._engine.execution_options(read_only=True).begin() as connection:
            rows = connection.execute(sa.select(tenants.c.tenant, *columns).where(limited))
            return {row[0]: Rate(row[1], row[2]) for row in rows}

    def take(self, tenant: str, rate: Rate, tokens: int) -> Minute:
        """Count one request of so many tokens, if both limits leave room for it."""
        with self._engine.begin() as connection:
            first = insert(connection, tenant_minutes).on_conflict_do_nothing()
            row = {"tenant": tenant, "minute": 0, "requests": 0, "tokens": 0}
            connection.execute(first, [row])
            mine = tenant_minutes.c.tenant == tenant
            query = sa.select(tenant_minutes).where(mine).with_for_update()
            before = connection.execute(query).one()
            now = int(connection.scalar(sa.select(now_us())) or 0)
            minute = now // MINUTE_US
            came, taken = before.requests, before.tokens
            if before.minute != minute:
                came = taken = 0
            granted = (rate.requests is None or came < rate.requests) and (
                rate.tokens is None or taken + tokens <= rate.tokens
            )
            if granted:
                came, taken = came + 1, taken + tokens
                counted = {"minute": minute, "requests": came, "tokens": taken}
                connection.execute(sa.update(tenant_minutes).where(mine).values(counted))
        left_s = ((minute + 1) * MINUTE_US - now) / 1e6
        return Minute(tenant, rate, tokens, granted, came, taken, left_s)


def rate_of(tenant: str, limits: Mapping[str, Rate]) -> Rate:
    """What holds for a tenant: each limit its own, or EACH's where it says nothing."""
    own, each = (limits.get(name, Rate()) for name in (tenant, EACH))
    return Rate(
        each.requests if own.requests is None else own.requests,
        each.tokens if own.tokens is None else own.tokens,
    )


def estimated_tokens(job: Job) -> int:
    """What a job may take: all the new tokens that it asks for, and a token for four characters of
    its prompt, tools and their calls included; only a worker can count those."""
    chars = len(job.prompt or "") + tools_bytes(job.tools or ())
    for message in job.messages or ():
        calls = message.tool_calls or ()
        chars += len(message.content or "") + sum(len(call.function.arguments) for call in calls)
    params = job.sampling_params
    return params.candidates * params.max_new_tokens - (-chars // CHARS_PER_TOKEN)
