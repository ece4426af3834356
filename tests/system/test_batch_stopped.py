"""A worker process stops a batch that may spend no more: what only its feeder can reach, too."""

from __future__ import annotations

import json
from collections import Counter

from shop import Shop, wait_until

from lorabatch import Job
from lorabatch.batches import Batches
from lorabatch.ledger import Outcome
from lorabatch.stopping import limit
from lorabatch.tables import batches, jobs, results
from tests.played_worker import succeeds

HELD = [f"held-{n}" for n in range(4)]  # by a worker that runs one at once
NOBODYS = [f"waits-{n}" for n in range(5)]  # in a queue that no worker drains


def accepted(shop: Shop) -> None:
    """A batch with a limit, of jobs that run for minutes."""
    Batches(shop.ledger.engine).add("b", "default", "x")
    limit(shop.ledger.engine, "b", max_tokens=8)
    for queue, names in (("lorabatch", HELD), ("elsewhere", [*NOBODYS, "spends"])):
        made = [{"job_id": name, "prompt": "x", "batch_id": "b"} for name in names]
        long = {"max_new_tokens": 131_072}
        some = [Job.parse({**job, "sampling_params": long}) for job in made]
        shop.ledger.accept(some, queue=queue)


def spend(shop: Shop) -> None:
    """As another worker records it."""
    (claim,) = shop.ledger.claim(["spends"], "me", 60).values()
    assert shop.ledger.record([Outcome(claim, succeeds(claim))]) == {"spends"}


def states(shop: Shop) -> dict[str, str]:
    return {row.job_id: row.state for row in shop.rows(jobs)}


def all_held(shop: Shop) -> bool:
    held = [row for row in shop.rows(jobs) if row.state == "running"]
    return len(held) == len(HELD) and any(row.begun for row in held)


def test_the_feeder_ends_what_waits_and_what_has_not_begun(any_shop: Shop) -> None:
    shop = any_shop
    accepted(shop)
    worker = shop.start(LORABATCH_MAX_SEQS="1", LORABATCH_LOOKAHEAD="4").wait_ready()
    wait_until("all held", lambda: all_held(shop), shown=lambda: states(shop))
    (begun,) = [row.job_id for row in shop.rows(jobs) if row.begun]
    spend(shop)
    stopped = dict.fromkeys((*HELD, *NOBODYS), "cancelled")
    stopped |= {begun: "running", "spends": "succeeded"}
    wait_until("the rest ended", lambda: states(shop) == stopped, shown=lambda: states(shop))
    shop.ledger.cancel([begun])
    shop.wait_ended(len(stopped))
    codes = Counter(row.error_code for row in shop.rows(results))
    assert codes == {None: 1, "budget_exhausted": len(stopped) - 1}
    (batch,) = shop.rows(batches)
    assert (batch.spent_tokens, batch.stopped_us is None) == (8, False)
    (told,) = [json.loads(line) for line in worker.text().splitlines() if "batch stopped" in line]
    asked = len(HELD) - 1
    assert (told["batch_id"], told["cancelled"], told["asked"]) == ("b", len(NOBODYS), asked)
