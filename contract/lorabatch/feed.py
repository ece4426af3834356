"""What is in the queue and what goes there next: a fair share of each tenant's accepted jobs.

Producers send little themselves and leave the rest to the workers, each of which feeds the queue.
No tenant has more than `window` messages there (as many again for each worker that looks at the
same moment), or more jobs under way than it is allowed to run: the others wait in the ledger, where
they cost nothing and can be cancelled at once. By priority, then by deadline, then by age. A job is
noted as sent before it is sent: one whose message is lost is found by `nowhere`, and sent again.
Database errors pass through.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import sqlalchemy as sa

from lorabatch.claim import Message
from lorabatch.database import now_us
from lorabatch.statements import chunks
from lorabatch.tables import jobs, tenants
from lorabatch.tenants import EACH

__all__ = ["Feed"]

TAKE_MAX = 2000  # of all tenants together: a short transaction, and little to find again

# As the indexes say it: with parameters in place of the states neither database would use them.
UNSENT = sa.text("jobs.state = 'queued' AND jobs.sent_us IS NULL")
UNDER_WAY = sa.text("jobs.state IN ('queued', 'running') AND jobs.sent_us IS NOT NULL")
MESSAGE = (jobs.c.job_id, jobs.c.tenant, jobs.c.adapter_id, jobs.c.publish_result)


class Feed:
    """Of one queue. For many producers and workers at once: each takes other jobs."""

    def __init__(self, engine: sa.Engine, queue: str, window: int = 1000) -> None:
        self._engine = engine
        self._window = window
        self._mine = jobs.c.queue == queue

    def take(self) -> list[Message]:
        """Jobs to be sent now, noted as sent, the tenants mixed."""
        waiting = self._tenants()
        if not waiting:
            return []
        with self._engine.begin() as connection:
            room = self._room(connection, waiting)
            share = max(1, TAKE_MAX // len(waiting))
            taken = [
                self._next(connection, name, min(room[name], share))
                for name in waiting
                if room[name] > 0
            ]
            _note(connection, [message.job_id for some in taken for message in some])
        return _mixed(taken)

    def take_these(self, job_ids: Sequence[str]) -> list[Message]:
        """Those of these jobs that nobody has sent and that there is room for, noted as sent, in
        the order given."""
        found: dict[str, Message] = {}
        taken: list[Message] = []
        with self._engine.begin() as connection:
            for some in chunks(sorted(job_ids)):
                mine = UNSENT, self._mine, jobs.c.job_id.in_(some)
                query = sa.select(*MESSAGE).where(*mine).order_by(jobs.c.job_id)
                rows = connection.execute(query.with_for_update(skip_locked=True))
                found.update((row.job_id, Message(*row)) for row in rows)
            room = self._room(connection, sorted({message.tenant for message in found.values()}))
            for job_id in dict.fromkeys(job_ids):
                if job_id in found and room[found[job_id].tenant] > 0:
                    room[found[job_id].tenant] -= 1
                    taken.append(found[job_id])
            _note(connection, [message.job_id for message in taken])
        return taken

    def unsent(self, job_ids: Sequence[str]) -> list[str]:
        """Those of these jobs that wait and that nobody has sent, each once, in the order given."""
        found = set[str]()
        with self._engine.execution_options(read_only=True).begin() as connection:
            for some in chunks(sorted(set(job_ids))):
                query = sa.select(jobs.c.job_id).where(UNSENT, self._mine, jobs.c.job_id.in_(some))
                found.update(connection.scalars(query))
        return [job_id for job_id in dict.fromkeys(job_ids) if job_id in found]

    def give_back(self, job_ids: Sequence[str]) -> None:
        """The broker did not take these: they are unsent again, and the workers' to send."""
        with self._engine.begin() as connection:
            for some in chunks(sorted(job_ids)):
                mine = jobs.c.job_id.in_(some), jobs.c.state == "queued"
                connection.execute(sa.update(jobs).where(*mine).values(sent_us=None))

    def nowhere(self, resend_after_s: float, limit: int = 1000) -> list[Message]:
        """Open jobs that may have no message: queued and sent long ago, or running under a lease
        that has run out. What was not looked at for longest comes first: `mark_sent` ends that."""
        with self._engine.execution_options(read_only=True).begin() as connection:
            now = int(connection.scalar(sa.select(now_us())) or 0)
            old = now - round(resend_after_s * 1e6)
            queued = sa.and_(jobs.c.state == "queued", jobs.c.sent_us < old)
            expired = sa.and_(jobs.c.state == "running", jobs.c.lease_expires_us < now)
            query = sa.select(*MESSAGE).where(sa.or_(queued, expired), self._mine)
            rows = connection.execute(query.order_by(jobs.c.sent_us).limit(limit))
            return [Message(*row) for row in rows]

    def mark_sent(self, job_ids: Sequence[str]) -> None:
        """Note that a message for each of these jobs is in the queue."""
        with self._engine.begin() as connection:
            _note(connection, job_ids)

    # -- inside ----------------------------------------------------------------

    def _tenants(self) -> list[str]:
        """With unsent jobs: one look at the index for each, however many jobs it has."""
        found: list[str] = []
        query = sa.select(sa.func.min(jobs.c.tenant)).where(UNSENT, self._mine)
        with self._engine.execution_options(read_only=True).begin() as connection:
            name = connection.scalar(query)
            while name is not None:
                found.append(name)
                name = connection.scalar(query.where(jobs.c.tenant > name))
        return found

    def _room(self, connection: sa.Connection, waiting: list[str]) -> dict[str, int]:
        """How many more of each tenant's jobs may be sent."""
        limited = sa.select(tenants.c.tenant, tenants.c.max_running).where(
            tenants.c.tenant.in_([*waiting, EACH]), tenants.c.max_running.is_not(None)
        )
        # Locked, so that two workers do not fill the same room.
        rows = connection.execute(limited.order_by(tenants.c.tenant).with_for_update())
        most = {row.tenant: row.max_running for row in rows}
        in_queue = sa.and_(jobs.c.state == "queued", jobs.c.sent_us <= now_us())  # not again later
        counted = sa.select(
            jobs.c.tenant, sa.func.count(), sa.func.sum(sa.case((in_queue, 1), else_=0))
        ).where(UNDER_WAY, self._mine, jobs.c.tenant.in_(waiting))
        totals = connection.execute(counted.group_by(jobs.c.tenant))
        under_way = {row[0]: (int(row[1]), int(row[2])) for row in totals}
        room = {}
        for name in waiting:
            count, queued = under_way.get(name, (0, 0))
            room[name] = self._window - queued
            limit = most.get(name, most.get(EACH))
            if limit is not None:
                room[name] = min(room[name], limit - count)
        return room

    def _next(self, connection: sa.Connection, tenant: str, count: int) -> list[Message]:
        """The tenant's next jobs, locked; others' are skipped."""
        found: list[Message] = []
        mine = sa.and_(UNSENT, self._mine, jobs.c.tenant == tenant)
        below = sa.true()
        while len(found) < count:  # a priority at a time, which the index gives in order
            highest = connection.scalar(sa.select(sa.func.max(jobs.c.priority)).where(mine, below))
            if highest is None:
                break
            query = (
                sa.select(*MESSAGE)
                .where(mine, jobs.c.priority == highest)
                .order_by(jobs.c.done_by_us, jobs.c.submitted_us)
                .limit(count - len(found))
                .with_for_update(skip_locked=True)
            )
            found += [Message(*row) for row in connection.execute(query)]
            below = jobs.c.priority < highest
        return found


def _note(connection: sa.Connection, job_ids: Iterable[str]) -> None:
    for some in chunks(sorted(job_ids)):
        connection.execute(sa.update(jobs).where(jobs.c.job_id.in_(some)).values(sent_us=now_us()))


def _mixed(taken: list[list[Message]]) -> list[Message]:
    """One of each in turn."""
    longest = max((len(some) for some in taken), default=0)
    return [some[i] for i in range(longest) for some in taken if i < len(some)]
