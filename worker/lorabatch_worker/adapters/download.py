"""Files that come over the network into a folder, a piece at a time, resumed where they were cut.

`name.part` is what has come of a file, `name.tag` the source's tag of it: what was cut goes on from
there only while the tag is the same. When all files are whole, only they are left. Sizes are bytes.
Raises Refused (larger than allowed, wrong digest), Failed (deadline), Busy (it ended early); what
the network raises passes through.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from lorabatch_worker.adapters.attempts import Busy, Deadline, Refused

__all__ = ["OpenAt", "RemoteFile", "check_size", "clear", "receive"]

SUFFIXES = (".part", ".tag")


@dataclass(frozen=True)
class RemoteFile:
    """`tag` changes when the content does. `digest`: `sha256:HEX`, `git:HEX` (a blob's), None."""

    name: str
    address: str
    tag: str
    size: int | None = None
    digest: str | None = None


OpenAt = Callable[[RemoteFile, int], AbstractContextManager[tuple[int, Iterator[bytes]]]]
"""From that byte on: the byte that it really begins at (a source may ignore it), and the pieces."""


def receive(
    files: Sequence[RemoteFile], into: Path, open_at: OpenAt, limit: int, deadline: Deadline
) -> None:
    """Bring exactly these files into the folder, which may hold what came before."""
    check_size((file.size or 0 for file in files), limit)
    clear(into, keep={file.name + suffix for file in files for suffix in ("", *SUFFIXES)})
    room = limit
    for file in files:
        room -= _receive_one(file, into, open_at, room, deadline)
    for file in files:
        (into / f"{file.name}.tag").unlink(missing_ok=True)


def check_size(sizes: Iterable[int], limit: int) -> None:
    total = sum(sizes)
    if total > limit:
        raise Refused(
            f"its files hold {total:,} bytes, allowed {limit:,}: raise LORABATCH_ADAPTER_MAX_BYTES"
        )


def clear(folder: Path, keep: set[str]) -> None:
    """Remove what does not belong to the adapter any more."""
    for entry in folder.iterdir():
        if entry.name in keep and not entry.is_symlink() and entry.is_file():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _receive_one(
    file: RemoteFile, into: Path, open_at: OpenAt, limit: int, deadline: Deadline
) -> int:
    """Its size."""
    whole, part, tag = into / file.name, into / f"{file.name}.part", into / f"{file.name}.tag"
    if not tag.is_file() or tag.read_text() != file.tag:
        whole.unlink(missing_ok=True)
        part.unlink(missing_ok=True)
        tag.write_text(file.tag)
    if whole.is_file():
        return whole.stat().st_size
    if file.size is None:  # there is no telling whether what came is all of it
        part.unlink(missing_ok=True)
    part.touch()
    if part.stat().st_size != file.size:
        _append(file, part, open_at, limit, deadline)
    size = part.stat().st_size
    if file.size is not None and size != file.size:
        if size > file.size:
            part.unlink()
        raise Busy(f"{file.name} ended after {size:,} of {file.size:,} bytes")
    _check_digest(file, part, size)
    part.rename(whole)
    return size


def _append(file: RemoteFile, part: Path, open_at: OpenAt, limit: int, deadline: Deadline) -> None:
    with part.open("r+b") as out, open_at(file, part.stat().st_size) as (start, pieces):
        out.truncate(start)
        out.seek(start)
        for piece in pieces:
            deadline.check()
            check_size((out.tell(), len(piece)), limit)
            out.write(piece)


def _check_digest(file: RemoteFile, part: Path, size: int) -> None:
    if file.digest is None:
        return
    kind, _, wanted = file.digest.partition(":")
    found = hashlib.sha256()
    if kind == "git":
        found = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with part.open("rb") as data:
        while piece := data.read(1 << 20):
            found.update(piece)
    if found.hexdigest() != wanted:
        part.unlink()
        raise Refused(f"{file.name} came with digest {kind}:{found.hexdigest()}, wanted {wanted}")
