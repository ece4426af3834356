"""What bench.queue compares with: a task of Celery's own that records a job as our worker does."""

from __future__ import annotations

import os

from celery import Celery

from lorabatch import Ledger, Result, Usage
from lorabatch.database import connect
from lorabatch.ledger import Outcome, Start

app = Celery("stock", broker=os.environ["BENCH_BROKER"])
app.conf.update(task_acks_late=True, task_ignore_result=True, broker_connection_retry=True)
_ledgers: dict[int, Ledger] = {}


def ledger() -> Ledger:
    """One a process."""
    if os.getpid() not in _ledgers:
        _ledgers[os.getpid()] = Ledger(connect(os.environ["BENCH_DATABASE"]))
    return _ledgers[os.getpid()]


@app.task(name="bench.stock")
def stock(job_id: str) -> None:
    mine = ledger()
    claim = mine.claim([job_id], "stock", 60)[job_id]
    result = Result(
        job_id=job_id,
        tenant=claim.job.tenant,
        adapter_id=None,
        state="succeeded",
        text="text",
        token_ids=(1,),
        finish_reason="length",
        seed=claim.job.seed,
        usage=Usage(prompt_tokens=2, output_tokens=1),
    )
    mine.record([Outcome(claim, result)], [Start(claim)])
