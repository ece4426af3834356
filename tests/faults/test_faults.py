"""Most faults once, on one database each. The long form is `python -m tests.faults`."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator

import pytest

from tests.faults.observed import attempt
from tests.faults.rows import CASES, Case
from tests.faults.shop import Shop
from tests.postgres import fresh_database

JOBS = 48
TRIES = 4
OWN_WORKERS = (3, 4, 6, 7, 14)
SHORT = sorted((case for case in CASES if case.short), key=lambda case: case.row in OWN_WORKERS)
"""First those that all go with the same workers: a start takes longer than most faults."""


def once(case: Case) -> str:
    """The database of its short form: these take turns."""
    return case.databases[zlib.crc32(case.name.encode()) % len(case.databases)]


@pytest.fixture(scope="module")
def shops(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Shop]]:
    """One on each database, for all faults."""
    url = fresh_database(request.getfixturevalue("postgres_server"))
    both = {
        "sqlite": Shop(tmp_path_factory.mktemp("sqlite")),
        "postgresql": Shop(tmp_path_factory.mktemp("postgresql"), url),
    }
    yield both
    for shop in both.values():
        shop.close()


@pytest.mark.parametrize("case", SHORT, ids=lambda case: f"{case.row}-{case.name}")
def test_nothing_is_lost_or_repeated(case: Case, shops: dict[str, Shop]) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    shop = shops[once(case)]
    for _ in range(TRIES):
        tried = attempt(case.fault, shop, rng, JOBS)
        print(f"seed {seed}, {shop.database}: {tried}")
        assert tried.faultless, tried
        if tried.hit:
            return
    pytest.fail(f"{case.name}: its moment did not come in {TRIES} tries")
