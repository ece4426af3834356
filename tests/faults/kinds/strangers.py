"""Messages and rows that this version does not know: parked or refused, never lost silently."""

from __future__ import annotations

import random

import sqlalchemy as sa

from lorabatch.queue import TASK_NAME
from lorabatch.tables import jobs
from tests.faults.observed import Observed
from tests.faults.shop import Shop
from tests.faults.waiting import until

__all__ = ["newer_message", "newer_row", "unknown_task"]

NEWER = 2
FAILED = frozenset({"failed"})
STRANGERS = 3


def newer_message(shop: Shop, rng: random.Random, count: int) -> Observed:
    """Whole jobs are refused and say so; of accepted jobs only the message is newer."""
    shop.crew.ready(2)
    batch = shop.accept(rng, count)
    pointers, whole = shop.make(rng, STRANGERS), shop.make(rng, STRANGERS)
    shop.ledger.accept(pointers)
    shop.note(pointers)
    batch.add(pointers)
    for job in pointers:
        fields = {"schema_version": NEWER, "tenant": job.tenant, "adapter_id": job.adapter_id}
        shop.client.send_task(TASK_NAME, kwargs=fields, task_id=job.job_id, ignore_result=True)
    for job in whole:
        fields = {"schema_version": NEWER, "prompt": job.prompt, "tenant": job.tenant, "new": 1}
        shop.client.send_task(TASK_NAME, kwargs=fields, task_id=job.job_id)
    shop.note(whole)
    batch.add(whole, plain=True)
    batch.allowed.update(dict.fromkeys((job.job_id for job in whole), FAILED))
    return Observed(batch)


def newer_row(shop: Shop, rng: random.Random, count: int) -> Observed:
    """The worker holds the message of a row that it cannot read, until one can."""
    shop.crew.end(shop.crew.members)
    strange = shop.accept(rng, STRANGERS)
    bodies = {job_id: job.body() for job_id, job in strange.jobs.items()}
    _write(shop, {job_id: {**body, "new_field": 1} for job_id, body in bodies.items()})
    batch = shop.accept(rng, count)
    members = shop.crew.ready(2)
    shop.wait_ended(batch)
    until("held", lambda: any("message held" in member.text() for member in members))
    states = shop.ledger.states(list(bodies))
    kept = shop.ids_in_broker() >= bodies.keys()
    _write(shop, bodies)
    batch.add(strange.jobs.values())
    wrong = [] if kept else ["the message of a newer row is gone"]
    if set(states.values()) != {"queued"}:
        wrong.append(f"newer rows are {sorted(states.values())}")
    return Observed(batch, wrong=lambda: wrong)


def unknown_task(shop: Shop, rng: random.Random, count: int) -> Observed:
    """Refused by name, in the log and to who waits for it; the jobs beside it go on."""
    members = shop.crew.ready(2)
    name = f"lorabatch.summarize{rng.randrange(10**6)}"
    sent = [shop.client.send_task(name, kwargs={"text": "x"}) for _ in range(STRANGERS)]
    batch = shop.accept(rng, count)
    until("refused", lambda: all(result.state == "FAILURE" for result in sent))
    logged = any(member.news().count(name) > 0 for member in members)
    return Observed(batch, wrong=lambda: [] if logged else ["dropped without a word in the log"])


def _write(shop: Shop, bodies: dict[str, dict[str, object]]) -> None:
    with shop.ledger.engine.begin() as connection:
        for job_id, body in bodies.items():
            connection.execute(sa.update(jobs).where(jobs.c.job_id == job_id).values(body=body))
