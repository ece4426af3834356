"""What an upload leaves when its server dies at the worst moment, and who takes it away."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from lorabatch import Settings
from lorabatch.files import Files
from lorabatch_producer.server.tidying import LEFT_S, tidy
from tests.http_server import served

UPLOAD: dict[str, Any] = {"data": {"purpose": "batch"}, "files": {"file": ("a.jsonl", b"{}\n")}}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_old(folder: Path) -> None:
    when = time.time() - LEFT_S - 1
    for path in folder.iterdir():
        os.utime(path, (when, when))


def test_a_file_that_was_never_noted_goes_when_it_is_old(
    http_settings: Settings, database: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server dies between the rename and the commit, as far as the folder can tell."""
    folder, files = http_settings.files_folder, Files(database)
    with served(http_settings) as url:
        good = httpx.post(f"{url}/v1/files", **UPLOAD).json()["id"]
        with monkeypatch.context() as patched:
            patched.setattr(Files, "add", lambda *_, **__: 1 / 0)
            assert httpx.post(f"{url}/v1/files", **UPLOAD).status_code == 500
    (lost,) = {name for name in names(folder) if name.startswith("file-")} - {good}
    left = sorted([good, lost, f".{lost}.kept"])
    assert names(folder) == left
    tidy(files, folder)
    assert names(folder) == left, "whoever uploads it may be about to note it"
    make_old(folder)
    tidy(files, folder)
    assert names(folder) == [good]


def test_a_file_that_was_noted_stays_whatever_lies_beside_it(
    http_settings: Settings, database: sa.Engine
) -> None:
    """The server dies between the commit and taking the mark away."""
    folder, files = http_settings.files_folder, Files(database)
    with served(http_settings) as url:
        good = httpx.post(f"{url}/v1/files", **UPLOAD).json()["id"]
    (folder / f".{good}.kept").touch()
    (folder / "file-of-somebody-else").touch()
    make_old(folder)
    tidy(files, folder)
    assert names(folder) == sorted([good, "file-of-somebody-else"])
