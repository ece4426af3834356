"""Adapters in local folders: copied, so that what is loaded cannot change under way.

With roots configured a folder must lie in one of them, wherever symlinks lead. Without, any folder
may be named, and its files must be its own. Raises Absent, Refused, Failed, Busy (a file changes
just now).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from lorabatch_worker.adapters.attempts import Absent, Busy, Deadline, Refused
from lorabatch_worker.adapters.download import check_size, clear
from lorabatch_worker.adapters.weights import FILES

__all__ = ["copy_folder"]

PIECE_BYTES = 1 << 20


def copy_folder(
    place: str, into: Path, roots: Sequence[Path], limit: int, deadline: Deadline
) -> None:
    """Copy the adapter's files, those that exist."""
    folder = Path(place).resolve()
    root = _root_of(folder, roots)
    if not folder.is_dir():
        raise Absent
    paths = {name: folder / name for name in FILES if os.path.lexists(folder / name)}
    for name, path in paths.items():
        if not path.resolve().is_relative_to(root):
            raise Refused(
                f"{name} is a symlink that leads out of {root}; put the file itself there, or list "
                "a folder that holds both in LORABATCH_ADAPTER_ROOTS",
                f"{name} is a symlink that leads out of its folder",
            )
    check_size((_size(path) for path in paths.values()), limit)
    clear(into, keep=set())
    room = limit
    for name, path in paths.items():
        room -= _copy(path.resolve(), into / name, room, deadline)


def _root_of(folder: Path, roots: Sequence[Path]) -> Path:
    """Said before whether there is a folder: what lies elsewhere is nobody's business."""
    if not roots:
        return folder
    for root in roots:
        if folder.is_relative_to(root.resolve()):
            return root.resolve()
    raise Refused(
        f"outside of LORABATCH_ADAPTER_ROOTS, which allows {', '.join(map(str, roots))}; move it "
        "there, or add its folder",
        "its folder is outside of LORABATCH_ADAPTER_ROOTS",
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _copy(path: Path, into: Path, limit: int, deadline: Deadline) -> int:
    """Its size. Opened so that neither a pipe nor a link that came a moment ago is followed."""
    number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(number, "rb") as source, into.open("wb") as out:
        before = os.fstat(number)
        if not stat.S_ISREG(before.st_mode):
            raise Refused(f"{path.name} is not a regular file")
        while piece := source.read(PIECE_BYTES):
            deadline.check()
            check_size((out.tell(), len(piece)), limit)
            out.write(piece)
        after = os.fstat(number)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise Busy(f"{path.name} changed while it was copied")
        return out.tell()
