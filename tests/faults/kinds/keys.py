"""One idempotency key many times at once, and producers that die before anybody has an answer."""

from __future__ import annotations

import random

import sqlalchemy as sa

from lorabatch import Job
from lorabatch.tables import jobs
from tests.faults.observed import Fault, Observed
from tests.faults.producer import KILLED, Played
from tests.faults.shop import Shop

__all__ = ["at_once", "killed"]

PROCESSES = 2
TIMES = 100
OTHERS = 10


def at_once(shop: Shop, rng: random.Random, count: int) -> Observed:
    """100 calls with it from two processes, some of which mean another request."""
    shop.crew.ready(2)
    one, other = shop.make(rng, 2)
    key = {"idempotency_key": f"key-{one.job_id}", "tenant": one.tenant}
    asked = [_again(one, **key) for _ in range(TIMES - OTHERS)]
    asked += [_again(other, **key) for _ in range(OTHERS)]
    rng.shuffle(asked)
    parts = [asked[n::PROCESSES] for n in range(PROCESSES)]
    processes = [Played(shop.crew.env, calls=[[job] for job in part]) for part in parts]
    for process in processes:
        process.go()
    batch = shop.accept(rng, count - 1)
    answers = [a for process in processes for a in process.answers()]
    (row,) = _rows(shop, key["idempotency_key"])  # one job, whoever was first
    known = {job.job_id: job for job in asked}
    batch.add([known[row.job_id]])
    shop.note([known[row.job_id]])
    wrong = []
    for job, answer in zip([job for part in parts for job in part], answers, strict=True):
        same = job.prompt == known[row.job_id].prompt
        if answer != ([row.job_id] if same else "IdempotencyConflict"):
            wrong.append(f"a request that is {'the same' if same else 'another'} got {answer}")
    return Observed(batch, wrong=lambda: wrong)


def killed(boundary: str) -> Fault:
    """The process of a producer, when its jobs are in the ledger and not in the queue. Nobody had
    an answer from it, so the same is asked for again."""

    def kill(shop: Shop, rng: random.Random, count: int) -> Observed:
        shop.crew.ready(2)
        batch = shop.accept(rng, count // 2)
        made = shop.make(rng, count - count // 2)
        made = [_again(job, idempotency_key=f"key-{job.job_id}") for job in made]
        process = Played({**shop.crew.env, "FAULT_KILL": f"{boundary} 1"}, calls=[made])
        answers = process.go().answers()
        killed_us = shop.now_us()
        ids = [job.job_id for job in made]
        known = shop.ledger.states(ids)
        shop.note(made)
        batch.add(made)
        again = Played(shop.crew.env, calls=[[_again(job)] for job in made])
        wrong = (
            []
            if again.go().answers() == [[job_id] for job_id in ids]
            else ["other jobs when asked"]
        )
        if answers or process.code != KILLED or len(known) < len(ids):
            wrong.append(f"{len(known)} of {len(ids)} jobs were in the ledger: {answers}")
        return Observed(
            batch, recovered=lambda: shop.taken_up_s(ids, killed_us), wrong=lambda: wrong
        )

    return kill


def _again(job: Job, **fields: str) -> Job:
    """The same request from somebody who knows no id of it."""
    return Job.parse({**job.model_dump(mode="json", exclude={"job_id"}), **fields})


def _rows(shop: Shop, key: str) -> list[sa.Row[tuple[str]]]:
    with shop.ledger.engine.connect() as connection:
        query = sa.select(jobs.c.job_id).where(jobs.c.idempotency_key == key)
        return list(connection.execute(query))
