"""What a fault's function gives back, and a try: the fault, then the end, then the oracle."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.faults.batch import Batch
from tests.faults.oracle import Verdict, judge
from tests.faults.shop import Shop
from tests.faults.waiting import NotWithin

__all__ = ["Fault", "Observed", "Try", "attempt"]


@dataclass
class Observed:
    """One fault, made. `hit` is False if its moment did not come, say because the other worker had
    done all by then: the try counts for nothing. `recovered` is asked after the end and gives the
    seconds until work went on, none where it never stopped. `wrong` is asked then, too, and gives
    what the oracle does not know of. `published`: plain clients' results must be there."""

    batch: Batch
    hit: bool = True
    recovered: Callable[[], list[float]] = list
    wrong: Callable[[], list[str]] = list
    published: bool = True


Fault = Callable[[Shop, random.Random, int], Observed]


@dataclass
class Try:
    """`recovery_s`: at most one figure, the longest of the jobs that the fault hit."""

    hit: bool
    jobs: int
    verdict: Verdict
    recovery_s: list[float]
    wrong: list[str]

    @property
    def faultless(self) -> bool:
        return self.verdict.faultless and not self.wrong


def attempt(fault: Fault, shop: Shop, rng: random.Random, jobs: int) -> Try:
    """Raises what the fault raises: NotWithin if it could not even be made."""
    observed = fault(shop, rng, jobs)
    wrong: list[str] = []
    waits: list[Callable[[], None]] = [lambda: shop.wait_ended(observed.batch), shop.wait_quiet]
    for wait in waits:
        try:
            wait()
        except NotWithin as error:
            wrong.append(str(error))
    verdict = judge(shop, observed.batch, observed.published)
    shop.forget_results(observed.batch)
    wrong += observed.wrong()
    recovery_s = [max(some)] if (some := observed.recovered()) else []
    return Try(observed.hit, len(observed.batch.jobs), verdict, recovery_s, wrong)
