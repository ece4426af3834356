"""Every row of docs/security.md names a test that exists."""

from __future__ import annotations

import re

import pytest

from tests.models import ROOT

TESTS = ROOT / "tests"
ROWS = [
    line.strip("| \n").split(" | ")
    for line in (ROOT / "docs" / "security.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| bad input")
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_a_row_names_a_test_that_exists(row: list[str]) -> None:
    assert len(row) == 3, row
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row[2])
    assert named, row
    for file, name in named:
        assert re.search(rf"^(async )?def {name}\(", (TESTS / file).read_text(), re.M), name


def test_every_security_test_has_a_row() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    for path in sorted((TESTS / "security").glob("test_*.py")):
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.M):
            assert path.name == "test_security_page.py" or name in text, name
