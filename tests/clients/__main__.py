"""The table of clients and features, as this run found it: `python -m tests.clients [--write]`.

Runs the tests beside this file against one service with the real model. `--write` keeps the table
in docs/clients.md. The exit code is pytest's.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "clients.md"
BEGIN, END = "<!-- table -->\n", "<!-- end -->"
WORDS = {"passed": "yes", "failed": "**no**", "skipped": "-"}
DISTRIBUTIONS = {"openai_async": "openai", "langchain": "langchain-openai", "lorax": "lorax-client"}


class Seen:
    """A plugin of pytest's: how each feature (a test's name) of each client (its file) ended."""

    def __init__(self) -> None:
        self.ended: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            file, _, name = report.nodeid.partition("::")
            client = Path(file).stem.removeprefix("test_")
            feature = re.sub(r"\[.*", "", name).removeprefix("test_").replace("_", " ")
            self.ended.setdefault(client, {})[feature] = report.outcome


def table(ended: Mapping[str, Mapping[str, str]]) -> str:
    """In Markdown: a row for each feature, a column for each client."""
    features = list(dict.fromkeys(name for found in ended.values() for name in found))
    rows = [["", *map(_titled, ended)], ["---"] * (len(ended) + 1)]
    for feature in sorted(features, key=lambda name: -sum(name in f for f in ended.values())):
        cells = [WORDS.get(found.get(feature, ""), "") for found in ended.values()]
        rows.append([feature, *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _titled(client: str) -> str:
    """With what its tests' first line calls it, and its version."""
    title = ast.get_docstring(ast.parse((FOLDER / f"test_{client}.py").read_text())) or client
    name = DISTRIBUTIONS.get(client, client.replace("_", "-"))
    shown = title.partition(":")[0].rstrip(".")
    try:
        return f"{shown} {version(name)}"
    except PackageNotFoundError:  # curl
        return shown


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    seen = Seen()
    code = pytest.main([str(FOLDER), "-q", "-p", "no:cacheprovider"], plugins=[seen])
    found = table(seen.ended)
    print(found)
    if given.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + found + END + rest.partition(END)[2])
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
