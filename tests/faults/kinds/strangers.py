"""Messages and rows that this version does not know: parked or refused, never lost."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from lorabatch.queue import TASK_NAME
from lorabatch.tables import jobs
from lorabatch_worker.sweeper import task_id_of
from tests.faults.crew import Member
from tests.faults.observed import Observed
from tests.faults.shop import Shop
from tests.faults.waiting import until

__all__ = ["newer_message", "newer_row", "unknown_task"]

NEWER = 2
FAILED = frozenset({"failed"})
STRANGERS = 3


def newer_message(shop: Shop, rng: random.Random, count: int) -> Observed:
    """Whole jobs are refused and say so; pointers to accepted jobs wait for a newer worker."""
    members = shop.crew.ready(2)
    batch = shop.accept(rng, count)
    pointers, whole = shop.make(rng, STRANGERS), shop.make(rng, STRANGERS)
    shop.ledger.accept(pointers, as_sent=True)
    shop.note(pointers)
    batch.add(pointers)
    ids = [job.job_id for job in pointers]
    for job in pointers:
        fields = {"schema_version": NEWER, "tenant": job.tenant, "adapter_id": job.adapter_id}
        shop.client.send_task(TASK_NAME, kwargs=fields, task_id=job.job_id, ignore_result=True)
    for job in whole:
        fields = {"schema_version": NEWER, "prompt": job.prompt, "tenant": job.tenant, "new": 1}
        shop.client.send_task(TASK_NAME, kwargs=fields, task_id=job.job_id)
    shop.note(whole)
    batch.add(whole, plain=True)
    batch.allowed.update(dict.fromkeys((job.job_id for job in whole), FAILED))
    wrong = _parked(shop, members, ids)
    if set(shop.ledger.states(ids).values()) != {"queued"}:
        wrong.append("pointers of a newer schema were not left alone")
    shop.wait_ended(batch, len(batch.jobs) - STRANGERS)
    shop.crew.ready(1, FAULT_NEWER="new.task")
    return Observed(batch, wrong=lambda: wrong)


def newer_row(shop: Shop, rng: random.Random, count: int) -> Observed:
    """The broker keeps the message of a row that no worker can read, until one can."""
    shop.crew.end(shop.crew.members)
    strange = shop.accept(rng, STRANGERS)
    bodies = {job_id: job.body() for job_id, job in strange.jobs.items()}
    _write(shop, {job_id: {**body, "new_field": 1} for job_id, body in bodies.items()})
    batch = shop.accept(rng, count)
    members = shop.crew.ready(2)
    shop.wait_ended(batch)
    wrong = _parked(shop, members, list(bodies))
    states = shop.ledger.states(list(bodies))
    if set(states.values()) != {"queued"}:
        wrong.append(f"newer rows are {sorted(states.values())}")
    _write(shop, bodies)
    batch.add(strange.jobs.values())
    return Observed(batch, wrong=lambda: wrong)


def unknown_task(shop: Shop, rng: random.Random, count: int) -> Observed:
    """It waits for a worker that knows it; the jobs beside it go on."""
    members = shop.crew.ready(2)
    name = f"lorabatch.summarize{rng.randrange(10**6)}"
    sent = [shop.client.send_task(name, kwargs={"text": "x"}) for _ in range(STRANGERS)]
    batch = shop.accept(rng, count)
    wrong = _parked(shop, members, [result.id for result in sent])
    if any(name not in line for line in _parkings(members)):
        wrong.append(f"the log does not name {name}")
    shop.wait_ended(batch)
    shop.crew.ready(1, FAULT_NEWER=name)
    until("run by one that knows it", lambda: all(result.state == "SUCCESS" for result in sent))
    return Observed(batch, wrong=lambda: wrong)


def _parked(shop: Shop, members: list[Member], ids: Sequence[str]) -> list[str]:
    """Wait until these messages were seen and are still there, and then given out once more."""
    wanted = set(ids)

    def seen() -> bool:
        lines = _parkings(members)
        return all(any(job_id in line for line in lines) for job_id in ids)

    until("parked", seen)
    since_s = time.time()
    gone = wanted - shop.ids_in_broker()
    until("given out again", lambda: wanted <= _given_out(shop, since_s))
    return [f"parked, and gone: {sorted(gone)}"] if gone else []


def _given_out(shop: Shop, since_s: float) -> set[str]:
    client: Any = shop.broker.client
    tags: list[bytes] = client.zrange("unacked_index", f"({since_s}", "+inf", byscore=True)
    return {task_id_of(raw) for raw in (client.hget("unacked", tag) for tag in tags) if raw}


def _parkings(members: list[Member]) -> list[str]:
    lines = [line for member in members for line in member.news().splitlines()]
    return [line for line in lines if "message parked" in line]


def _write(shop: Shop, bodies: dict[str, dict[str, object]]) -> None:
    with shop.ledger.engine.begin() as connection:
        for job_id, body in bodies.items():
            connection.execute(sa.update(jobs).where(jobs.c.job_id == job_id).values(body=body))
