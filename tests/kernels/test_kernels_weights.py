"""An adapter's tensors as a device reads them: the layout, exactly as much memory, given back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lora_cases import TOLERANCE, alone, assert_close

from lorabatch_kernels import LoraWeights, SiteGroup, add_lora, build_step_map
from lorabatch_kernels.lora import add_lora_reference
from lorabatch_kernels.weights import SPARE, Arena, elements

LAYOUTS = pytest.mark.parametrize("paneled", [True, False], ids=["panels", "rows"])
RANKS = (0, 1, 3, 4, 15, 16, 17, 31, 32, 40)


def drawn(rank: int, wide: int = 5, out: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(rank)
    return torch.randn(rank, wide, generator=draw), torch.randn(out, rank, generator=draw)


@LAYOUTS
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("rank", RANKS)
def test_what_is_packed_comes_back(rank, affine, paneled):
    a, b = drawn(rank)
    both = (torch.randn(7), torch.randn(7)) if affine else None
    made = LoraWeights.pack(a, b, 0.5, both, paneled)
    assert torch.equal(made.a, a)
    assert torch.equal(made.b, b)
    assert (made.rank, made.in_features, made.out_features, made.scale) == (rank, 5, 7, 0.5)
    assert made.rows == rank + 2 * affine
    if both is None:
        assert made.affine is None
    else:
        assert all(torch.equal(got, row) for got, row in zip(made.affine, both, strict=True))


@pytest.mark.parametrize("rank", RANKS[1:])
def test_panels_hold_rank_rows_by_column(rank):
    a, b = drawn(rank)
    made = LoraWeights.pack(a, b, 1.0)
    at = 0
    for first in range(0, rank, 16):
        rows = a[first : first + 16]
        panel = made.memory[at : at + rows.numel()].view(5, len(rows))
        assert torch.equal(panel, rows.t())
        at += rows.numel()
    assert torch.equal(made.memory[at : at + b.numel()].view(rank, 7), b.t())


@LAYOUTS
def test_an_adapter_takes_what_its_tensors_take(paneled):
    sizes = [(rank, 5, 7, rank % 2 == 1) for rank in RANKS]
    arena = Arena([elements(*size) for size in sizes], torch.bfloat16, paneled=paneled)
    placed, tensors = [], 0
    for rank, _, _, affine in sizes:
        a, b = drawn(rank)
        both = (torch.ones(7), torch.zeros(7)) if affine else None
        placed.append(arena.place(a, b, 1.0, both))
        tensors += 2 * (a.numel() + b.numel() + 14 * affine)
    assert sum(made.nbytes for made in placed) == tensors
    assert placed[0].memory.numel() * 2 == tensors + 2 * SPARE
    for rank, made in zip(RANKS, placed, strict=True):
        assert torch.equal(made.a, drawn(rank)[0].bfloat16())


@pytest.mark.parametrize("rank", [1, 4, 12, 17, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_what_lies_behind_is_read_into_a_sum(rank, dtype):
    """A narrow panel is read by whole vectors, into what follows it in memory."""
    wide, out = 70, 50
    sizes = [elements(rank, wide, out, False)] * 2
    arena = Arena(sizes, dtype)
    a, b = drawn(rank, wide, out)
    nan = torch.full_like(a, torch.nan), torch.full_like(b, torch.nan)
    group = SiteGroup.allocate(2, 64, wide, [out], dtype, "cpu")
    site = group.sites[0]
    site.put(0, arena.place(a, b, 0.5))
    arena.place(*nan, 1.0)
    x, y = torch.randn(3, wide).to(dtype), torch.randn(3, out).to(dtype)
    wanted = add_lora_reference(y, x, site, [0, -1, 0])
    add_lora(y, x, alone(site), build_step_map([0, -1, 0], "cpu"))
    assert_close("y", wanted, y.float(), TOLERANCE[dtype])


def test_memory_is_given_back_when_the_last_layer_goes():
    statm = Path("/proc/self/statm")

    def resident_bytes() -> int:
        return int(statm.read_text().split()[1]) * 4096

    def load() -> list[LoraWeights]:
        arena = Arena([elements(16, 4096, 4096, False)] * 64, torch.float32)
        a, b = drawn(16, 4096, 4096)
        return [arena.place(a, b, 1.0) for _ in range(64)]

    before = resident_bytes()
    placed = load()
    held = resident_bytes() - before
    assert held > 30_000_000
    last = placed.pop()
    del placed
    assert resident_bytes() - before > 30_000_000
    del last
    assert resident_bytes() - before < held / 10


def test_mistakes_are_named():
    arena = Arena([1000], torch.float32)
    with pytest.raises(ValueError, match=r"b is \[7, 3\], wanted \[out_features, 2\]"):
        arena.place(torch.ones(2, 5), torch.ones(7, 3), 1.0)
    with pytest.raises(ValueError, match=r"gain or shift is \[6\], wanted \[7\]"):
        arena.place(torch.ones(2, 5), torch.ones(7, 2), 1.0, (torch.ones(7), torch.ones(6)))
