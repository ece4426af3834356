"""Workers that live on a stream of jobs: one is never replaced, the others are when they fall."""

from __future__ import annotations

import random

import sqlalchemy as sa

from lorabatch.tables import job_attempts
from tests.faults.crew import Member
from tests.faults.kinds.brokers import QUICK
from tests.faults.shop import Shop
from tests.faults.stream import Stream

__all__ = ["Street"]

OTHERS = 2
LIKE_A_CLIENT = {
    "LORABATCH_RESULT_EXPIRES_S": "60",  # as one that reads its results and forgets them
    "LORABATCH_MAX_CRASHES": "1000000",  # this asks about exactly once, not about poison
    "LORABATCH_MAX_ATTEMPTS": "1000000",
    "FAULT_BUSY_S": "1",
}


class Street:
    """A shop, its stream, and `members`, of which the first is the survivor. All of them reach
    broker and PostgreSQL through the shop's proxies, and each has a clock that can be set."""

    def __init__(self, shop: Shop, rng: random.Random, rate: float) -> None:
        self.shop = shop
        self.stream = Stream(shop, rng, rate)
        env = {
            "LORABATCH_BROKER_URL": shop.broker.url_by("127.0.0.1", shop.broker_proxy.port),
            "FAULT_TRANSPORT": QUICK,
            **LIKE_A_CLIENT,
        }
        if shop.database_proxy is not None:
            env["LORABATCH_DATABASE_URL"] = shop.proxied_database_url
        self.wrong: list[str] = []
        self.members: list[Member] = []
        for number in range(1 + OTHERS):
            clock = shop.home / f"clock-{number}"
            clock.write_text("0")
            self.members.append(shop.crew.start(FAULT_CLOCK=str(clock), **env))
        for member in self.members:
            member.wait_ready()

    @property
    def survivor(self) -> Member:
        return self.members[0]

    def survivor_claims(self, since_us: int = 0) -> int:
        """Jobs that it took up after that."""
        mine = job_attempts.c.worker.contains(self.survivor.owner)
        query = sa.select(sa.func.count()).where(mine, job_attempts.c.started_us > since_us)
        with self.shop.ledger.engine.execution_options(read_only=True).begin() as connection:
            return connection.scalar(query) or 0

    def working(self) -> list[Member]:
        """The others, of which those that were just started may not be ready."""
        self.tend()
        return [member for member in self.members[1:] if member.ready]

    def tend(self) -> None:
        """Another worker for each that has ended. None should have but by a fault, or because it
        found no broker when it started."""
        for member in self.members:
            if not member.alive:
                if member.ready:
                    self.wrong.append(f"{member.owner} ended by itself: {member.text()[-2000:]}")
                self.replace(member)

    def replace(self, member: Member) -> None:
        """A new worker in the place of one that has ended, as a supervisor would start it."""
        self.shop.crew.end([member])
        self.members[self.members.index(member)] = self.shop.crew.start(**member.env)
