"""What a bad adapter is, and the ways to make one from the good one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lorabatch import errors
from tests.bad_adapters.good import write


class Bad(NamedTuple):
    what: str
    make: Callable[[Path], None]
    error: type[errors.LoraBatchError]
    words: tuple[str, ...]


def with_config(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: write(folder, fields)


def with_tensors(
    tensors: dict[str, Tensor], without: tuple[str, ...] = (), **fields: Any
) -> Callable[[Path], None]:
    return lambda folder: write(folder, fields, tensors, without)


def with_file(name: str, content: bytes | str | None) -> Callable[[Path], None]:
    """A good adapter with one file replaced, or removed for None."""

    def make(folder: Path) -> None:
        write(folder)
        data = content.encode() if isinstance(content, str) else content
        if data is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(data)

    return make
