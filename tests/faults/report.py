"""What many tries come to: the table of docs/reliability.md, and a line each for the figures."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.observed import Try
from tests.faults.oracle import Verdict
from tests.faults.rows import Case

__all__ = ["Sum", "table", "write_table"]

HEAD = (
    "| fault | tries | jobs | lost | duplicated | usage difference | recovery p50 / p99 s |",
    "|---|---|---|---|---|---|---|",
)
NEW = """# Reliability

What is done to workers, broker and database, and what becomes of accepted jobs. A try is one
fault at a random moment, or at the boundary that is named, while jobs run in two worker processes
on the fake runner, a real Valkey, and SQLite or PostgreSQL; both databases together make a line.
Then every job is looked at: `lost` did not end as it should, `duplicated` has a result or a usage
row too many, and the usage is compared with a recount of the tokens that are stored. Outputs of
another job, results that a plain client does not get and messages that are left over end the
command with an error.

Recovery is the time until the last job that the fault hit was in a worker's hands again (a worker
killed or stopped, messages lost, jobs cancelled), until the worker was gone (SIGTERM, SIGQUIT),
or, from the end of an outage, until the first job was claimed or recorded. Leases and visibility
timeout are of 2 s here, where 30 s and 60 s are the defaults, so that the first of these is
around 2 s. Row 4 believes in a silent connection for 2 s, where the default is 10 s; the real
network below has the defaults.

`python -m tests.faults --faults 1000 --jobs 100000` writes this table:

<!-- faults: begin -->
<!-- faults: end -->

The same by a real network, in namespaces (`python -m tests.faults.namespaces`):

<!-- namespaces: begin -->
<!-- namespaces: end -->
"""


@dataclass
class Sum:
    """All tries of one fault on one database."""

    case: Case
    database: str
    tries: int = 0
    missed: int = 0
    jobs: int = 0
    verdict: Verdict = field(default_factory=Verdict)
    recovery_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def add(self, tried: Try) -> None:
        self.tries += tried.hit
        self.missed += not tried.hit
        self.jobs += tried.jobs
        self.verdict.add(tried.verdict)
        self.wrong += tried.wrong
        if tried.hit:
            self.recovery_s += tried.recovery_s

    @property
    def faultless(self) -> bool:
        return self.verdict.faultless and not self.wrong

    def figures(self) -> dict[str, Any]:
        """For a line of JSON."""
        verdict = self.verdict
        return {
            "row": self.case.row,
            "fault": self.case.name,
            "database": self.database,
            "tries": self.tries,
            "missed": self.missed,
            "jobs": self.jobs,
            "lost": verdict.lost,
            "duplicated": verdict.duplicated,
            "usage_difference": verdict.usage_difference,
            "swapped": verdict.swapped,
            "unpublished": verdict.unpublished,
            "left_in_broker": verdict.left_in_broker,
            "claims_per_job": round(verdict.claims / max(1, self.jobs), 3),
            "recovery_s": percentiles(self.recovery_s),
            "wrong": (verdict.examples + self.wrong)[:5],
        }


def percentiles(values: Sequence[float]) -> list[float]:
    """p50 and p99, or nothing."""
    if not values:
        return []
    ordered = sorted(values)
    last = ordered[min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))]
    return [round(statistics.median(ordered), 2), round(last, 2)]


def table(sums: Iterable[Sum]) -> str:
    """One line for each fault, both databases together."""
    merged: dict[tuple[int, str], Sum] = {}
    for one in sums:
        into = merged.setdefault((one.case.row, one.case.name), Sum(one.case, "both"))
        into.tries += one.tries
        into.jobs += one.jobs
        into.verdict.add(one.verdict)
        into.recovery_s += one.recovery_s
    lines = [*HEAD]
    for one in merged.values():
        verdict = one.verdict
        recovery = " / ".join(f"{s:.2f}" for s in percentiles(one.recovery_s)) or "-"
        counts = (one.tries, one.jobs, verdict.lost, verdict.duplicated, verdict.usage_difference)
        cells = (f"{one.case.row}: {one.case.name}", *(f"{n:,}" for n in counts), recovery)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_table(path: Path, text: str, name: str = "faults") -> None:
    """Between the two markers of this name; the rest of the page stays."""
    first, last = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    page = path.read_text() if path.exists() else NEW
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"{path}: no line {first} with {last} after it")
    new = path.with_suffix(".new")
    path.parent.mkdir(exist_ok=True)
    new.write_text(f"{before}{first}\n{text}\n{last}{after}")
    os.replace(new, path)
