"""Files that nobody has any more: expired ones, and what uploads left that did not come to an end.

Any number of servers may tidy one folder at a time. What an upload left is looked at after a day,
when whoever began it has long given up; a whole file goes only if it has the mark of an upload and
the database does not know it. Database errors pass through.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from lorabatch.files import Files

__all__ = ["tidy"]

LEFT_S = 86_400.0


def tidy(files: Files, folder: Path) -> None:
    for file_id in files.remove_expired():
        (folder / file_id).unlink(missing_ok=True)
    for path in _left(folder, ".new"):
        path.unlink(missing_ok=True)
    for mark in _left(folder, ".kept"):
        file_id = mark.name.removeprefix(".").removesuffix(".kept")
        if not files.is_known(file_id):
            (folder / file_id).unlink(missing_ok=True)
        mark.unlink(missing_ok=True)


def _left(folder: Path, suffix: str) -> Iterator[Path]:
    """Of uploads that began long ago."""
    for path in folder.glob(f".file-*{suffix}"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > LEFT_S:
                yield path
