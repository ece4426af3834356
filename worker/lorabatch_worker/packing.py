"""Tables of numbers that go to the device together, in one copy.

A host-to-device copy costs microseconds whatever its size, and waits for the device unless it comes
from pinned memory. Each table begins at a multiple of 16 bytes. Raises nothing of its own.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["Packed"]

ALIGN_BYTES = 16
CODES = {torch.int32: "i", torch.int64: "q", torch.float32: "f", torch.float64: "d"}


class Packed:
    """Tables in the order of their `add`."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._tables: list[tuple[int, torch.dtype, tuple[int, ...]]] = []

    def add(self, values: Iterable[float], dtype: torch.dtype) -> None:
        numbers = array(CODES[dtype], values)
        self._begin(dtype, (len(numbers),))
        self._bytes += numbers.tobytes()

    def add_rows(self, rows: Sequence[Sequence[int]], width: int) -> None:
        """An int32 table [rows, width]; shorter rows end in zeros."""
        start = self._begin(torch.int32, (len(rows), width))
        self._bytes += bytes(4 * len(rows) * width)
        for number, row in enumerate(rows):
            assert len(row) <= width
            first = start + 4 * number * width
            self._bytes[first : first + 4 * len(row)] = array("i", row).tobytes()

    def send(self, device: torch.device, into: Tensor | None = None) -> Tensor:
        """The bytes of all tables on the device, in `into` where that is given. On a GPU this does
        not wait: what is launched later sees them."""
        if not self._bytes:
            return torch.empty(0, dtype=torch.uint8, device=device)
        host = torch.frombuffer(self._bytes, dtype=torch.uint8)
        if device.type == "cuda":
            host = host.pin_memory()
        if into is not None:
            return into.copy_(host, non_blocking=True)
        return host.to(device, non_blocking=True)

    def views(self, sent: Tensor) -> list[Tensor]:
        """The tables in what `send` gave."""
        found = []
        for start, dtype, shape in self._tables:
            count = torch.Size(shape).numel()
            table = sent[start : start + count * dtype.itemsize].view(dtype)
            found.append(table.view(shape) if len(shape) > 1 else table)
        return found

    def _begin(self, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
        self._bytes += bytes(-len(self._bytes) % ALIGN_BYTES)
        start = len(self._bytes)
        self._tables.append((start, dtype, shape))
        return start
