"""The snippets of docs/python.md, run as they stand, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lorabatch import Ledger, Settings
from lorabatch.errors import LoraBatchError
from lorabatch_producer.tables import COLUMNS
from tests.models import ROOT
from tests.played_worker import working

PAGE = (ROOT / "docs" / "python.md").read_text()


def test_every_snippet_runs(
    settings: Settings,
    ledger: Ledger,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LORABATCH_HOME", str(settings.home))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    with working(ledger):
        for number, snippet in enumerate(re.findall("```python\n(.*?)```", PAGE, re.DOTALL)):
            exec(compile(snippet, f"snippet {number}", "exec"), names)
            assert ("print(" in snippet) == bool(capsys.readouterr().out), f"snippet {number}"
    assert number == 7
    assert (len(names["accepted"]), len(names["frame"])) == (3_000, 20)
    assert list(names["frame"].columns) == list(COLUMNS)
    assert ledger.counts() == {"succeeded": 1 + 20 + 6_000 + 1 + 3 + 10}


def test_every_error_of_the_page_is_one_of_ours() -> None:
    import lorabatch.errors
    import lorabatch_producer

    table = PAGE.partition("## Errors")[2]
    named = re.findall(r"`([A-Z]\w+)`", "".join(re.findall(r"^\|.*?\|", table, re.MULTILINE)))
    kinds = [getattr(lorabatch.errors, n, getattr(lorabatch_producer, n, None)) for n in named]
    assert len(kinds) == 11
    assert all(isinstance(kind, type) and issubclass(kind, LoraBatchError) for kind in kinds)
