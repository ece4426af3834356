"""The served API under Schemathesis, which makes requests of its OpenAPI document, right and wrong.

    python -m tests.fuzz_http --cases 300 --keys on

A real server on SQLite and an embedded Valkey, with a played worker behind it. Ends with one JSON
line: the cases run and the failures. Not covered: how long anything takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lorabatch import Ledger, Settings
from lorabatch.database import open_database
from lorabatch.embedded import ensure_valkey, stop_valkey
from lorabatch.keys import Keys
from lorabatch.registry import SHARED, Registered, Registry
from tests.http_server import served
from tests.played_worker import working

__all__ = ["fuzzed", "serving"]

# What is right by a document may be refused all the same: a name that is nobody's, a field that
# only another one allows.
LEFT_OUT = "positive_data_acceptance"
EVENTS = "/jobs/{job_id}/events"  # a header that nobody knows is taken for an error there
RUNS = (
    ("--exclude-path", EVENTS, "--exclude-checks", LEFT_OUT),
    ("--include-path", EVENTS, "--exclude-checks", f"{LEFT_OUT},negative_data_rejection"),
)
CASES = re.compile(r"(\d+) generated")


@contextlib.contextmanager
def serving(home: Path, keys: bool) -> Iterator[tuple[str, str]]:
    """A server with a worker, its URL and a key."""
    settings = Settings.load(
        home=home,
        base_model="base",
        broker_url=ensure_valkey(home),
        http_keys="on" if keys else "off",
        http_wait_s=20.0,
        http_max_body_bytes=1 << 16,
    )
    engine = open_database(settings)
    Registry(engine).add(Registered(SHARED, "sql", "1" * 64, "/adapters/1", None, 8, 1, 0))
    _, key = Keys(engine).create("default")
    try:
        with served(settings) as url, working(Ledger(engine)):
            yield url, key
    finally:
        engine.dispose()
        stop_valkey(home)


class Fuzzed(NamedTuple):
    """`status` 0: nothing failed."""

    status: int
    cases: int
    said: str


def fuzzed(url: str, key: str | None, cases: int, *more: str) -> Fuzzed:
    """`cases`: of each operation. `key` None: none is wanted."""
    command = [str(Path(sys.executable).with_name("st")), "run", f"{url}/openapi.json"]
    command += ["--header", f"Authorization: Bearer {key}"] if key else []
    command += ["--max-examples", str(cases), "--checks", "all"]
    command += ["--request-timeout", "30", "--no-color", "--warnings", "off", *more]
    status, ran, said = 0, 0, ""
    with tempfile.TemporaryDirectory() as folder:
        for run in RUNS:
            asked = [*command, *run]
            done = subprocess.run(asked, cwd=folder, capture_output=True, text=True, check=False)
            found = CASES.search(done.stdout)
            status, ran = status or done.returncode, ran + int(found[1] if found else 0)
            said += done.stdout + done.stderr
    return Fuzzed(status, ran, said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100, help="of each operation")
    parser.add_argument("--keys", choices=("on", "off"), default="off")
    parser.add_argument("more", nargs="*", help="arguments for `st run`, after --")
    given = parser.parse_args()
    keys = given.keys == "on"
    with tempfile.TemporaryDirectory() as home, serving(Path(home), keys) as (url, key):
        found = fuzzed(url, key if keys else None, given.cases, *given.more)
    print(found.said)
    print(json.dumps({"cases": found.cases, "keys": given.keys, "status": found.status}))
    sys.exit(found.status)


if __name__ == "__main__":
    main()
