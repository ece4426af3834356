"""Tables that are sent together come out as they went in."""

from __future__ import annotations

import torch

from lorabatch_worker.packing import ALIGN_BYTES, Packed

CPU = torch.device("cpu")


def tables() -> Packed:
    packed = Packed()
    packed.add([5, -1, 2**40], torch.int64)
    packed.add([7], torch.int32)
    packed.add([], torch.int64)
    packed.add([0.1, 1e300], torch.float64)
    packed.add([0.5], torch.float32)
    packed.add_rows([[1, 2, 3], [], [4]], 3)
    return packed


WANTED = [[5, -1, 2**40], [7], [], [0.1, 1e300], [0.5], [[1, 2, 3], [0, 0, 0], [4, 0, 0]]]


def test_tables_keep_numbers_types_and_shapes() -> None:
    packed = tables()
    found = packed.views(packed.send(CPU))
    assert [t.tolist() for t in found] == WANTED
    wanted = [torch.int64, torch.int32, torch.int64, torch.float64, torch.float32, torch.int32]
    assert [t.dtype for t in found] == wanted
    assert {t.storage_offset() * t.element_size() % ALIGN_BYTES for t in found} == {0}


def test_tables_are_sent_into_a_buffer_that_views_were_made_of() -> None:
    buffer = torch.zeros_like(tables().send(CPU))
    found = tables().views(buffer)
    assert tables().send(CPU, buffer) is buffer
    assert [t.tolist() for t in found] == WANTED


def test_empty_tables_can_be_sent() -> None:
    packed = Packed()
    packed.add([], torch.int64)
    assert packed.views(packed.send(CPU))[0].tolist() == []
