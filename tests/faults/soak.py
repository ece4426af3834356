"""Workers that live for an hour of faults: is all recorded once, and do they stay as small?

    python -m tests.faults.soak --minutes 60 [--database postgresql|sqlite] [--seed N]
                                [--rate JOBS_PER_S] [--faults-per-minute F] [--out FOLDER]

Three workers on the fake runner, jobs of three tenants at a steady rate, by our producer and by
plain Celery messages, and one fault after the other on whatever runs then (blows.py). One worker,
the survivor, is never replaced; all other kinds of faults it meets, too. At the end the oracle
looks at every job and the audit recounts the ledger. Appends a line to bench/results/soak.jsonl and
draws it; --out keeps logs and all samples. Exits 1 if a job was lost, repeated or miscounted, a
worker ended by itself, the survivor stopped working, or it grew by more than GROWTH_MB or
GROWTH_FDS after its warm-up of 5 minutes (a quarter of a shorter run).
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.plots import draw
from bench.record import RESULTS, record
from lorabatch_producer.audit import audit
from tests.faults.blows import Blow, blows
from tests.faults.meter import Meter, at, growth_per_hour, series
from tests.faults.oracle import Verdict, judge
from tests.faults.shop import Shop
from tests.faults.street import Street
from tests.faults.waiting import NotWithin, until
from tests.postgres import fresh_database, postgres

GROWTH_MB, GROWTH_FDS = 12.0, 12.0
WARM_MINUTES = 5.0
SHOWN = 240
END_LIMIT_S = 300.0
PAUSE_S = 1.0


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--database", choices=["postgresql", "sqlite"], default="postgresql")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--rate", type=float, default=10.0)
    parser.add_argument("--faults-per-minute", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=None)
    return parser.parse_args()


@contextmanager
def shop_on(database: str, folder: Path) -> Iterator[Shop]:
    with ExitStack() as stack:
        url = None
        if database == "postgresql":
            url = fresh_database(stack.enter_context(postgres()))
        shop = Shop(folder / "shop", url)
        stack.callback(shop.close)
        yield shop


class Faults:
    """Strikes until its time is over, every kind about as often; `made` and `missed` by kind."""

    def __init__(self, street: Street, rng: random.Random, per_minute: float) -> None:
        self._street, self._rng = street, rng
        self._longest_pause_s = 2 * 60 / per_minute
        self._kinds = blows(street.shop.database)
        self._deck: list[str] = []
        self.made = Counter[str]()
        self.missed = Counter[str]()
        self.wrong: list[str] = []

    def run(self, minutes: float) -> None:
        began_s = now_s = time.monotonic()
        due_s = began_s
        while now_s < began_s + minutes * 60 and not self._street.stream.error:
            due_s = max(now_s, due_s + self._rng.uniform(0, self._longest_pause_s))
            time.sleep(min(due_s, began_s + minutes * 60) - now_s)
            self._street.tend()
            if time.monotonic() < began_s + minutes * 60:
                self._strike((time.monotonic() - began_s) / 60)
            now_s = time.monotonic()

    def _strike(self, minutes: float) -> None:
        if not self._deck:
            self._deck = list(self._kinds)
            self._rng.shuffle(self._deck)
        name = self._deck.pop()
        blow: Blow = self._kinds[name]
        try:
            came = blow(self._street, self._rng)
        except Exception as error:  # noqa: BLE001 - the hour goes on, and its end says so
            traceback.print_exc()
            self.wrong.append(f"{name}: {type(error).__name__}: {error}")
            return
        (self.made if came else self.missed)[name] += 1
        word = "" if came else " (its moment did not come)"
        print(f"{minutes:.1f} min: {name}{word}", flush=True)


def wait_for_the_end(street: Street) -> list[str]:
    """What did not come."""
    shop, wrong = street.shop, []

    def none_open() -> bool:
        time.sleep(PAUSE_S)
        street.tend()
        counts = shop.ledger.counts()
        return not counts.get("queued") and not counts.get("running") and not shop.in_broker()

    try:
        until("all jobs ended", none_open, END_LIMIT_S, shop.ledger.counts)
    except NotWithin as error:
        wrong.append(str(error))
    return wrong


def judged(street: Street) -> Verdict:
    """All jobs, a portion at a time."""
    verdict = Verdict()
    for portion in street.stream.portions:
        verdict.add(judge(street.shop, portion, published=False))
    verdict.left_in_broker = sum(street.shop.in_broker().values())
    return verdict


def growth(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the survivor: memory and file descriptors after its warm-up, in the middle, at the end."""
    last = samples[-1]["minutes"]
    warm = min(WARM_MINUTES, last / 4)
    found: dict[str, Any] = {"warm_minutes": round(warm, 1)}
    for name in ("rss_mb", "fds", "threads"):
        points = series(samples, "survivor", name)
        found[name] = [at(points, minutes) for minutes in (warm, last / 2, last)]
        slope = growth_per_hour(points, warm)
        found[f"{name}_per_hour"] = round(slope, 2)
        found[f"{name}_grown"] = round(slope * (last - warm) / 60, 2)
    return found


def shown(samples: list[dict[str, Any]]) -> dict[str, list[float]]:
    """What the picture shows, in so many points at most."""
    some = samples[:: -(-len(samples) // SHOWN)]
    some = [sample for sample in some if "used_mb" in sample["broker"]]
    return {
        "minutes": [sample["minutes"] for sample in some],
        "rss_mb": [sample["survivor"]["rss_mb"] for sample in some],
        "fds": [sample["survivor"]["fds"] for sample in some],
        "threads": [sample["survivor"]["threads"] for sample in some],
        "broker_mb": [sample["broker"]["used_mb"] for sample in some],
        "open_jobs": [sample["open"] for sample in some],
    }


def main() -> int:
    args = options()
    folder = args.out or Path(tempfile.mkdtemp(prefix="lorabatch-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    with shop_on(args.database, folder) as shop:
        street = Street(shop, random.Random(rng.random()), args.rate)
        faults = Faults(street, rng, args.faults_per_minute)
        meter = Meter(street, folder / "samples.jsonl")
        street.stream.start()
        meter.start()
        faults.run(args.minutes)
        late_us = shop.now_us() - round(args.minutes * 60e6 / 4)
        measured = meter.is_alive()
        street.stream.stop()
        meter.stop()
        late = wait_for_the_end(street)
        verdict = judged(street)
        claims, last_claims = street.survivor_claims(), street.survivor_claims(late_us)
        differences = [str(difference) for difference in audit(shop.ledger.engine)]
        shop.crew.end([member for member in street.members if member is not street.survivor])
        code = street.survivor.stop()
    wrong = [*street.wrong, *faults.wrong, *late, *verdict.examples, *differences]
    wrong += [street.stream.error] if street.stream.error else []
    wrong += [f"the survivor's exit code is {code}"] if code else []
    wrong += [] if measured else ["the meter ended before the last fault"]
    wrong += [] if last_claims else ["the survivor took up no job in the last quarter"]
    grown = {"jobs": claims, **growth(meter.samples)}
    for name, most in (("rss_mb", GROWTH_MB), ("fds", GROWTH_FDS)):
        if grown[f"{name}_grown"] > most:
            wrong.append(f"{name} grew by {grown[f'{name}_grown']}, and {most:g} is allowed")
    record(
        "soak",
        seed=args.seed,
        minutes=args.minutes,
        database=args.database,
        rate=args.rate,
        jobs=street.stream.jobs,
        plain=sum(len(portion.plain) for portion in street.stream.portions),
        faults=dict(faults.made),
        missed=dict(faults.missed),
        lost=verdict.lost,
        duplicated=verdict.duplicated,
        usage_difference=verdict.usage_difference,
        swapped=verdict.swapped,
        left_in_broker=verdict.left_in_broker,
        claims_per_job=round(verdict.claims / max(1, street.stream.jobs), 3),
        survivor=grown,
        wrong=wrong[:5],
        series=shown(meter.samples),
    )
    print(*draw(RESULTS, names=["soak"]))
    print(f"logs and samples are in {folder}")
    return 0 if verdict.faultless and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
