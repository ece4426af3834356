"""A GPU of its own for each worker of a machine: LORABATCH_DEVICE=cuda:any.

Workers that share a data folder, in containers too, take the first GPU that no other of them has,
by a lock that the kernel frees when they end. Raises SettingsError if there is none left.
"""

from __future__ import annotations

import fcntl
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from lorabatch.errors import SettingsError

__all__ = ["ANY", "take_gpu"]

ANY = "cuda:any"
_held: list[IO[str]] = []
"""Open for as long as this process lives."""


def take_gpu(home: Path, ids: Sequence[str]) -> int:
    """The number of a GPU, of those with these ids."""
    folder = home / "gpus"
    folder.mkdir(parents=True, exist_ok=True)
    for number, gpu in enumerate(ids):
        file = (folder / f"{gpu}.lock").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
        else:
            _held.append(file)
            return number
    raise SettingsError(
        f"LORABATCH_DEVICE: {ANY!r} asked for, and of the {len(ids)} GPUs that torch sees here "
        f"none is left by the workers of {home}: run fewer, or give cpu"
    )
