"""The long form: the same faults again and again, at random moments.

    python -m tests.faults --faults 1000 --jobs 100000 [--rows 1,3,16] [--database sqlite]
                           [--seed N] [--minutes M]

Faults take turns until there were as many, or the minutes are over; the jobs are shared out among
them. Writes the table of docs/reliability.md and a line for each fault and database to
bench/results/faults.jsonl. Exits 1 if anything was lost, repeated, swapped or miscounted.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack
from pathlib import Path

from bench.record import record
from lorabatch.queue import check_broker
from lorabatch_producer.audit import audit
from tests.faults.crew import ROOT
from tests.faults.observed import attempt
from tests.faults.report import Sum, table, write_table
from tests.faults.rows import BOTH, CASES
from tests.faults.shop import LEASE_S, Shop
from tests.postgres import fresh_database, postgres

PAGE = ROOT / "docs" / "reliability.md"
FEWEST_JOBS = 12


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--rows", default=",".join(str(n) for n in sorted({c.row for c in CASES})))
    parser.add_argument("--database", choices=[*BOTH, "both"], default="both")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--page", type=Path, default=PAGE)
    return parser.parse_args()


class Yard:
    """A shop on each database, made anew after a try that failed."""

    def __init__(self, folder: Path, server: str | None) -> None:
        self._folder, self._server = folder, server
        self._shops: dict[str, Shop] = {}
        self._made = 0
        self.server_words: dict[str, str] = {}

    def shop(self, database: str) -> Shop:
        if database not in self._shops:
            self._made += 1
            url = fresh_database(self._server) if database != "sqlite" and self._server else None
            self._shops[database] = made = Shop(self._folder / f"shop-{self._made}", url)
            self.server_words["broker"] = check_broker(made.broker.url)
            with made.ledger.engine.connect() as connection:
                numbers = connection.dialect.server_version_info or ()
            self.server_words[database] = ".".join(map(str, numbers))
        return self._shops[database]

    def close(self, database: str) -> list[str]:
        """What the audit of all its jobs finds."""
        shop = self._shops.pop(database)
        found = [str(difference) for difference in audit(shop.ledger.engine)]
        shop.close()
        return found

    def close_all(self) -> list[str]:
        return [found for name in list(self._shops) for found in self.close(name)]


def run(args: argparse.Namespace, yard: Yard) -> list[Sum]:
    rows = {int(number) for number in args.rows.split(",")}
    asked = BOTH if args.database == "both" else (args.database,)
    turns = [Sum(c, d) for c in CASES for d in asked if c.row in rows and d in c.databases]
    jobs = max(FEWEST_JOBS, args.jobs // args.faults)
    end_s = time.monotonic() + args.minutes * 60
    for number in range(args.faults):
        if time.monotonic() > end_s:
            break
        turn = turns[number % len(turns)]
        rng = random.Random(f"{args.seed}/{number}")
        shop = yard.shop(turn.database)
        try:
            tried = attempt(turn.case.fault, shop, rng, jobs)
        except Exception as error:  # noqa: BLE001 - the others are to be tried all the same
            traceback.print_exc()
            turn.wrong.append(f"try {number}: {type(error).__name__}: {error}")
            turn.wrong += yard.close(turn.database)
            continue
        turn.add(tried)
        word = "fine" if tried.faultless else f"WRONG {tried}"
        took = f"{tried.recovery_s[0]:.2f} s" if tried.recovery_s else "-"
        came = "" if tried.hit else " (its moment did not come)"
        print(f"{number + 1} {turn.database}: {turn.case.name}{came}: {word}, {took}", flush=True)
    return turns


def main() -> int:
    args = options()
    folder = Path(tempfile.mkdtemp(prefix="lorabatch-faults-"))
    began_s = time.monotonic()
    with ExitStack() as stack:
        server = None
        if args.database != "sqlite":
            server = stack.enter_context(postgres())
        yard = Yard(folder, server)
        try:
            sums = [one for one in run(args, yard) if one.tries or one.missed or one.wrong]
        finally:
            differences = yard.close_all()
    seconds = round(time.monotonic() - began_s)
    for one in sums:
        record(
            "faults", seed=args.seed, lease_s=LEASE_S, servers=yard.server_words, **one.figures()
        )
    words = (
        f"{sum(one.tries for one in sums):,} faults, {sum(one.jobs for one in sums):,} jobs, "
        f"{seconds:,} s, seed {args.seed}, leases of {LEASE_S:g} s."
    )
    write_table(args.page, f"{table(sums)}\n\n{words}")
    print(f"{table(sums)}\n\n{words}\naudit: {differences or 'no difference'}")
    fine = all(one.faultless for one in sums) and not differences
    if fine:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"logs are kept in {folder}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
