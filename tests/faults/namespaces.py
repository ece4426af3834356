"""Row 4 on a real network: workers, router and servers in network namespaces of one machine.

    python -m tests.faults.namespaces [--tries 3] [--jobs 120] [--only NAME] [--seed N]
                                      [--longest-s 20] [--long-s 60]

Needs root, `ip netns`, `ss -K`, and no firewall; on PostgreSQL. Each fault lasts for up to
--longest-s and is lifted; the figure is how long after that the first job was claimed. Then the
partitions again, of --long-s each (0: not again). Two workers, both behind the router, with the
product's own timeouts. Writes its table into docs/reliability.md
and lines to bench/results/faults.jsonl. Exits 1 as `python -m tests.faults` does.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import sqlalchemy as sa

from bench.record import record
from tests.faults.broker import Broker
from tests.faults.crew import ROOT
from tests.faults.kinds.brokers import consuming_again
from tests.faults.network import BROKER, DATABASE, SERVERS, WORKERS, Network
from tests.faults.observed import Observed, attempt
from tests.faults.proxy import Proxy
from tests.faults.report import Sum, table, write_table
from tests.faults.rows import Case
from tests.faults.shop import Shop, connector
from tests.postgres import fresh_database, postgres

Hurt = Callable[[Network], None]


def _half_open(address: str, network: Network) -> None:
    """The servers forget their connections, and the news of it is dropped."""
    network.partition(BROKER, DATABASE, WORKERS)
    network.forget(network.servers, address)
    time.sleep(1.0)
    network.heal()


HURTS: dict[str, Hurt] = {
    "no way to the broker": lambda network: network.partition(BROKER),
    "no way to the database": lambda network: network.partition(DATABASE),
    "no way back": lambda network: network.partition(WORKERS),
    "no way there or back": lambda network: network.partition(BROKER, DATABASE, WORKERS),
    "workers unplugged": lambda network: network.unplug(),
    "a slow way": lambda network: network.slow(),
    "resets, broker": lambda network: network.forget(network.workers, BROKER),
    "resets, database": lambda network: network.forget(network.workers, DATABASE),
    "half-open, broker": partial(_half_open, BROKER),
    "half-open, database": partial(_half_open, DATABASE),
}
AT_ONCE = ("resets", "half-open")
PARTITIONS = (
    "no way to the broker",
    "no way to the database",
    "no way back",
    "no way there or back",
)

Span = tuple[float, float]


def cases(longest_s: float, long_s: float) -> dict[str, tuple[Hurt, Span]]:
    """What to do, and for how many seconds, at least and at most."""
    some = (longest_s / 4, longest_s)
    found = {n: (hurt, (0.0, 0.0) if n.startswith(AT_ONCE) else some) for n, hurt in HURTS.items()}
    long = PARTITIONS if long_s else ()
    return found | {f"{n}, {long_s:g} s": (HURTS[n], (long_s, long_s)) for n in long}


def part(
    network: Network, hurt: Hurt, span: Span, shop: Shop, rng: random.Random, jobs: int
) -> Observed:
    (member, _) = shop.crew.ready(2)
    batch = shop.accept(rng, jobs - jobs // 2)
    shop.wait_moment(rng, batch)
    hurt(network)
    try:
        shop.accept(rng, jobs // 2, into=batch)
        time.sleep(rng.uniform(*span))
    finally:
        network.heal()
    return consuming_again(shop, batch, shop.now_us(), member)


@contextmanager
def town(network: Network, folder: Path) -> Iterator[Shop]:
    """A shop whose servers and workers are apart."""
    with ExitStack() as stack:
        url = fresh_database(stack.enter_context(postgres()))
        forward = [*network.at(network.servers), sys.executable, "-m", __spec__.name]
        process = subprocess.Popen([*forward, "--forward", url], stdout=subprocess.PIPE, cwd=ROOT)
        stack.callback(process.wait)
        stack.callback(process.kill)
        assert process.stdout is not None
        port = int(process.stdout.readline())
        broker = Broker(folder / "broker", SERVERS, BROKER, network.at(network.servers))
        shop = Shop(folder / "shop", url, broker, network.at(network.workers))
        stack.callback(shop.close)
        through = sa.make_url(url).set(host=DATABASE, port=port).difference_update_query(["host"])
        shop.crew.env["LORABATCH_DATABASE_URL"] = through.render_as_string(hide_password=False)
        shop.crew.env["LORABATCH_BROKER_URL"] = broker.url_by(BROKER, broker.port)
        yield shop


def forward(url: str) -> None:
    """In the servers' namespace: PostgreSQL's Unix socket on a port of the network."""
    print(Proxy(connector(url), DATABASE).port, flush=True)
    while True:
        time.sleep(3600)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=120)
    parser.add_argument("--only", default="")
    parser.add_argument("--longest-s", type=float, default=20.0)
    parser.add_argument("--long-s", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "reliability.md")
    parser.add_argument("--forward", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = options()
    if args.forward:
        forward(args.forward)
    folder = Path(tempfile.mkdtemp(prefix="lorabatch-faults-"))
    sums = []
    with Network() as network, town(network, folder) as shop:
        for name, (hurt, span) in cases(args.longest_s, args.long_s).items():
            if args.only not in name:
                continue
            one = Sum(Case(4, name, partial(part, network, hurt, span)), shop.database)
            sums.append(one)
            for number in range(args.tries):
                rng = random.Random(f"{args.seed}/{name}/{number}")
                try:
                    tried = attempt(one.case.fault, shop, rng, args.jobs)
                except Exception as error:  # noqa: BLE001 - the others are to be tried all the same
                    traceback.print_exc()
                    one.wrong.append(f"{type(error).__name__}: {error}")
                    shop.crew.end(shop.crew.members)
                    continue
                one.add(tried)
                print(f"{name}: {tried}", flush=True)
    for one in sums:
        record("faults", network="namespaces", seed=args.seed, **one.figures())
    write_table(args.page, table(sums), "namespaces")
    print(table(sums))
    return 0 if all(one.faultless for one in sums) else 1


if __name__ == "__main__":
    sys.exit(main())
