"""kill -9 at random moments: every accepted job ends exactly once, with its own output.

KILLS=20 runs the long form: `KILLS=20 pytest tests/system/test_kill.py`.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter

from shop import Shop, check_exactly_once, wait_until

from lorabatch.tables import results, usage_events

JOBS = 200
KILLS = int(os.environ.get("KILLS", "6"))
STEP_S = 0.005
START_S = 2.5


def test_killed_workers_lose_and_repeat_nothing(any_shop: Shop) -> None:
    """A standby takes over from each killed worker, so that the two also meet at leases."""
    shop = any_shop
    seed = random.randrange(2**32)
    dice = random.Random(seed)
    slots = int(shop.env["LORABATCH_MAX_SEQS"])
    tokens = round(KILLS * START_S / STEP_S * slots / JOBS)  # so that work lasts for all kills
    runs = shop.home / "runs"
    env = {"FAKE_STEP_S": str(STEP_S), "FAKE_RUNS": str(runs)}
    env["LORABATCH_MAX_CRASHES"] = "1000"  # so many kills make any job look like poison
    worker = shop.start(**env).wait_ready()
    accepted = shop.accept(JOBS, tokens=tokens)
    open_at_kill = []
    for kill in range(KILLS):
        done = shop.ledger.counts().get("succeeded", 0)
        aim = min(JOBS, done + 1)
        wait_until("progress", lambda: shop.ledger.counts().get("succeeded", 0) >= aim)  # noqa: B023
        standby = shop.start(**env)
        if dice.random() < 0.5:
            standby.wait_ready()
        lucky = min(JOBS, aim + dice.randrange(JOBS // KILLS // 2))
        wait_until("moment", lambda: shop.ledger.counts().get("succeeded", 0) >= lucky)  # noqa: B023
        worker.kill()
        open_at_kill.append(JOBS - shop.ledger.counts().get("succeeded", 0))
        worker = standby.wait_ready()
        print(f"kill {kill + 1} (seed {seed}): {open_at_kill[-1]} jobs were open")
    shop.wait_ended(JOBS)
    executions = shop.executions()
    started = Counter(runs.read_text().split())
    print(
        f"{shop.ledger.engine.dialect.name}: {JOBS} jobs, {KILLS} kills, "
        f"{sum(executions.values())} claims, {sum(started.values())} runs, "
        f"at most {max(started.values())} of one job"
    )
    assert open_at_kill[KILLS // 2] > 0, "the work did not last"
    assert max(started.values()) > 1, "no kill hit a running job"
    assert sum(started.values()) <= JOBS + KILLS * 2 * slots  # running, and ended but not committed
    check_exactly_once(shop, accepted)
    shop.wait_broker_empty()


def test_kills_while_messages_are_fetched_lose_none_of_a_plain_client(shop: Shop) -> None:
    """Such a job has no row before a worker has its message: only the broker knows of it."""
    seed = random.randrange(2**32)
    dice = random.Random(seed)
    print(f"seed {seed}")
    sent = []
    env = {"FAKE_STEP_S": str(STEP_S), "LORABATCH_LOOKAHEAD": "64"}  # all are fetched at once
    for kill in range(KILLS):
        worker = shop.start(**env).wait_ready()
        for i in range(JOBS):
            prompt = f"prompt number {i} of {kill}"
            sent.append(shop.generate(prompt=prompt, sampling_params={"max_new_tokens": 2}))
        time.sleep(dice.uniform(0.0, 0.1))  # a random moment: anywhere in the fetch, or after it
        worker.kill()
    shop.start(**{**env, "FAKE_STEP_S": "0.001"})
    shop.wait_ended(len(sent))
    wanted = {result.id for result in sent}
    assert {row.job_id for row in shop.rows(results)} == wanted
    assert Counter(row.job_id for row in shop.rows(usage_events)) == Counter(wanted)
    shop.wait_broker_empty()
