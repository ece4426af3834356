"""A shop: a broker that can be hurt, a ledger, workers, a producer that notes what was accepted."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from celery import Celery

from lorabatch import Job, Ledger, SamplingParams, Settings
from lorabatch.database import connect, now_us, open_database, upgrade
from lorabatch.errors import QueueNotReady
from lorabatch.queue import TASK_NAME
from lorabatch.statements import chunks
from lorabatch.tables import job_attempts, jobs, results
from lorabatch_producer import Producer
from lorabatch_worker.sweeper import task_id_of
from tests.faults.batch import Batch
from tests.faults.broker import Broker
from tests.faults.crew import Crew, Member
from tests.faults.proxy import Proxy
from tests.faults.waiting import until

__all__ = ["LEASE_S", "Shop", "connector"]

LEASE_S = 2.0
FAST = {
    "LORABATCH_MAX_SEQS": "8",
    "LORABATCH_LEASE_S": str(LEASE_S),
    "LORABATCH_VISIBILITY_TIMEOUT_S": str(LEASE_S),
    "LORABATCH_SWEEP_INTERVAL_S": "0.5",
    "LORABATCH_RESEND_AFTER_S": "2",
    "LORABATCH_DRAIN_S": "20",
    "LORABATCH_LOG_FORMAT": "json",
    "FAKE_STEP_S": "0.005",
}
END_LIMIT_S = 120.0
UNREADABLE = ":unreadable"


class Shop:
    """On SQLite, or on the PostgreSQL database of this URL."""

    def __init__(
        self,
        home: Path,
        database_url: str | None = None,
        broker: Broker | None = None,
        worker_prefix: tuple[str, ...] = (),
    ) -> None:
        home.mkdir(exist_ok=True)
        self.home = home
        self.broker = broker or Broker(home / "broker")
        self.settings = Settings.load(
            home=home, database_url=database_url, broker_url=self.broker.url
        )
        if database_url is not None:
            upgrade(database_url)
        engine = connect(database_url) if database_url else open_database(self.settings)
        self.ledger = Ledger(engine)
        self.database = engine.dialect.name
        self.runs = home / "runs"
        env = {
            "LORABATCH_HOME": str(home),
            "LORABATCH_BROKER_URL": self.broker.url,
            "FAKE_RUNS": str(self.runs),
            **FAST,
        }
        if database_url is not None:
            env["LORABATCH_DATABASE_URL"] = database_url
        self.crew = Crew(home, env, worker_prefix)
        self._producer = Producer(self.settings)
        self.client = Celery(
            "client", broker=self.broker.url, backend=self.broker.url, set_as_current=False
        )
        self.broker_proxy = Proxy(self.broker.connect)
        self.database_proxy = None if database_url is None else Proxy(connector(database_url))
        self._accepted = (home / "accepted").open("a")
        self._serial = 0

    @property
    def proxied_database_url(self) -> str:
        """For workers that are to reach PostgreSQL through the proxy."""
        assert self.database_proxy is not None, "SQLite has no connection to cut"
        url = self.ledger.engine.url.set(host="127.0.0.1", port=self.database_proxy.port)
        return url.difference_update_query(["host"]).render_as_string(hide_password=False)

    # -- producers -----------------------------------------------------------

    def make(
        self,
        rng: random.Random,
        count: int,
        tokens: tuple[int, int] = (10, 40),
        long: int = 0,
    ) -> list[Job]:
        """`long`: of how many more characters than usual a text is."""
        made = []
        begins = f"long {long} " if long else ""
        for _ in range(count):
            self._serial += 1
            made.append(
                Job(
                    prompt=f"{begins}prompt number {self._serial}" + " word" * rng.randrange(9),
                    adapter_id=f"adapter-{rng.randrange(5)}",
                    tenant=f"tenant-{rng.randrange(3)}",
                    sampling_params=SamplingParams(max_new_tokens=rng.randint(*tokens)),
                )
            )
        return made

    def accept(
        self,
        rng: random.Random,
        count: int,
        tokens: tuple[int, int] = (10, 40),
        plain: float = 0.0,
        into: Batch | None = None,
        long: int = 0,
    ) -> Batch:
        """Jobs of our producer, and a share of a plain client's that the broker alone knows."""
        batch = Batch() if into is None else into
        made = self.make(rng, count, tokens, long)
        few = round(count * plain)
        self.accept_these(made[few:], batch)
        for job in made[:few]:
            body = job.model_dump(mode="json", include={"prompt", "adapter_id", "tenant"})
            body["sampling_params"] = {"max_new_tokens": job.sampling_params.max_new_tokens}
            self.client.send_task(TASK_NAME, kwargs=body, task_id=job.job_id)
        self.note(made[:few])
        batch.add(made[:few], plain=True)
        return batch

    def accept_these(self, made: Sequence[Job], into: Batch) -> list[str]:
        """These jobs, by our producer: their ids."""
        with contextlib.suppress(QueueNotReady):  # accepted all the same
            self._producer.enqueue_many(made)
        self.note(made)
        into.add(made)
        return [job.job_id for job in made]

    def note(self, made: Sequence[Job]) -> None:
        """They were accepted: on disk before anybody relies on it."""
        self._accepted.write("".join(f"{job.job_id}\n" for job in made))
        self._accepted.flush()
        os.fsync(self._accepted.fileno())

    def noted(self) -> list[str]:
        return (self.home / "accepted").read_text().split()

    # -- what is known -------------------------------------------------------

    def now_us(self) -> int:
        """By the database's clock, as all its times."""
        with self._reading() as connection:
            return int(connection.scalar(sa.select(now_us())) or 0)

    def _reading(self) -> AbstractContextManager[sa.Connection]:
        """Waits for no writer: one may be stopped in the middle of a transaction."""
        return self.ledger.engine.execution_options(read_only=True).begin()

    def counts(self, batch: Batch) -> Counter[str]:
        return Counter(self.ledger.states(batch.ids).values())

    def ended(self, batch: Batch) -> int:
        counts = self.counts(batch)
        return sum(counts.values()) - counts["queued"] - counts["running"]

    def rows(self, query: sa.Select[Any], column: sa.Column[Any], ids: Iterable[str]) -> list[Any]:
        """Rows of these jobs."""
        found: list[Any] = []
        with self._reading() as connection:
            for chunk in chunks(list(ids)):
                found += connection.execute(query.where(column.in_(chunk)))
        return found

    def held_by(self, member: Member, batch: Batch) -> set[str]:
        """Jobs under its lease."""
        query = sa.select(jobs.c.job_id).where(
            jobs.c.state == "running", jobs.c.lease_owner.contains(member.owner)
        )
        return {row.job_id for row in self.rows(query, jobs.c.job_id, batch.ids)}

    def taken_up_s(self, ids: Iterable[str], since_us: int) -> list[float]:
        """For each of these jobs: seconds until somebody claimed it again or it ended."""
        ids = list(ids)
        starts = sa.select(job_attempts.c.job_id, job_attempts.c.started_us.label("at"))
        ends = sa.select(results.c.job_id, results.c.recorded_us.label("at"))
        found: dict[str, int] = {}
        for row in [
            *self.rows(
                starts.where(job_attempts.c.started_us > since_us), job_attempts.c.job_id, ids
            ),
            *self.rows(ends.where(results.c.recorded_us > since_us), results.c.job_id, ids),
        ]:
            found[row.job_id] = min(row.at, found.get(row.job_id, row.at))
        return [(at - since_us) / 1e6 for at in found.values()]

    def in_broker(self) -> dict[str, int]:
        client: Any = self.broker.client
        sizes = {name: client.llen(name) for name in self._queues()}
        sizes["unacked"] = client.hlen("unacked")
        sizes["unacked_index"] = client.zcard("unacked_index")
        return {name: size for name, size in sizes.items() if size}

    def ids_in_broker(self, queued: bool = True) -> set[str]:
        """Jobs with a message that was given out, and those with one that is `queued`."""
        client: Any = self.broker.client
        raw: list[bytes] = list(client.hvals("unacked"))
        for name in self._queues() if queued else ():
            raw += client.lrange(name, 0, -1)
        return {task_id_of(item) for item in raw}

    def forget_results(self, batch: Batch) -> None:
        """Of plain clients, from the result backend."""
        if batch.plain:
            self.broker.client.delete(*(f"celery-task-meta-{job_id}" for job_id in batch.plain))

    def _queues(self) -> list[str]:
        """The lists that workers drain, with what their names are followed by."""
        names = [name.decode() for name in self.broker.client.scan_iter(count=1000, _type="list")]
        ours = tuple(self.settings.consume)
        return [name for name in names if name.startswith(ours) and not name.endswith(UNREADABLE)]

    # -- waiting -------------------------------------------------------------

    def wait_ended(
        self, batch: Batch, count: int | None = None, limit_s: float = END_LIMIT_S
    ) -> None:
        wanted = len(batch.jobs) if count is None else count
        until(
            f"{wanted} jobs ended",
            lambda: self.ended(batch) >= wanted,
            limit_s,
            lambda: self.counts(batch),
        )

    def wait_moment(self, rng: random.Random, batch: Batch, until_share: float = 0.7) -> None:
        """A random moment of the run."""
        self.wait_ended(batch, rng.randrange(max(1, round(len(batch.jobs) * until_share))))
        time.sleep(rng.uniform(0.0, 0.15))

    def wait_quiet(self) -> None:
        """No message is left: an acknowledgement that got lost comes with the next delivery."""
        until("broker empty", lambda: not self.in_broker(), 40.0, self.in_broker)

    def started(self) -> Counter[str]:
        """How often each job began to run."""
        return Counter(self.runs.read_text().split() if self.runs.exists() else ())

    def disconnect(self) -> None:
        """No connection to the database is open here; the next use opens one."""
        self._producer.close()
        self.ledger.engine.dispose()

    def close(self) -> None:
        self.crew.close()
        self.broker_proxy.close()
        if self.database_proxy:
            self.database_proxy.close()
        self._accepted.close()
        self.client.close()
        self._producer.close()
        self.ledger.engine.dispose()
        self.broker.close()


def connector(url: str) -> Callable[[], socket.socket]:
    """Opens a connection to a PostgreSQL server that listens on a Unix socket."""
    asked = sa.make_url(url).query
    path = f"{asked['host']}/.s.PGSQL.{asked.get('port', 5432)}"

    def connect_to() -> socket.socket:
        server = socket.socket(socket.AF_UNIX)
        server.connect(path)
        return server

    return connect_to
