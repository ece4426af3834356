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
from typing import Any

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
CASES = re.compile(r"(\d[\d,]*) generated")


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


def fuzzed(url: str, key: str, cases: int, *more: str) -> tuple[int, str]:
    """Schemathesis' exit status, 0 if nothing failed, and what it printed. `cases`: of each
    operation."""
    command = [str(Path(sys.executable).with_name("st")), "run", f"{url}/openapi.json"]
    command += ["--header", f"Authorization: Bearer {key}", "--max-examples", str(cases)]
    command += ["--checks", "all", "--exclude-checks", LEFT_OUT, "--request-timeout", "30"]
    command += ["--continue-on-failure", "--no-color", "--warnings", "off", *more]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=3600, check=False
        )
    return done.returncode, done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100, help="of each operation")
    parser.add_argument("--keys", choices=("on", "off"), default="off")
    parser.add_argument("more", nargs="*", help="arguments for `st run`, after --")
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as home,
        serving(Path(home), given.keys == "on") as (url, key),
    ):
        status, said = fuzzed(url, key, given.cases, *given.more)
    print(said)
    ran = CASES.search(said)
    found: dict[str, Any] = {"cases": int(ran[1].replace(",", "")) if ran else 0, "status": status}
    print(json.dumps(found))
    sys.exit(status)


if __name__ == "__main__":
    main()
