"""A LoRA site: contents change, addresses do not, and nothing stale survives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lora_cases import fill

from lorabatch_kernels import LoraSite


def small(dtype: torch.dtype = torch.float32) -> LoraSite:
    return LoraSite.allocate(3, 8, 5, 7, dtype, "cpu")


def test_load_puts_rank_rows_and_tables():
    site = small()
    a, b = torch.randn(3, 5), torch.randn(7, 3)
    site.load(1, a, b, 0.3)
    assert torch.equal(site.a[1, :3], a)
    assert torch.equal(site.b[1, :3], b.t())
    assert site.rank.tolist() == site.ranks == [0, 3, 0]
    assert site.row0.tolist() == [0, 8, 16]
    assert site.scale.tolist() == pytest.approx([0.0, 0.3, 0.0])
    assert (site.rank.dtype, site.row0.dtype) == (torch.int32, torch.int32)
    assert site.scale.dtype == torch.float32


def test_a_smaller_adapter_wipes_what_a_bigger_one_left():
    site = small()
    site.load(1, torch.full((8, 5), float("nan")), torch.full((7, 8), float("nan")), 1.0)
    site.load(1, torch.ones(2, 5), torch.ones(7, 2), 1.0)
    assert site.a[1, :2].eq(1).all()
    assert not site.a[1, 2:].any()
    assert not site.b[1, 2:].any()


def test_panels_hold_the_same_rows():
    site = LoraSite.allocate(2, 40, 5, 7, torch.float32, "cpu")
    fill(site, {0: 39, 1: 3})
    fill(site, {0: 17}, seed=1)
    assert site.panels.shape == (2, 3, 5, 16)
    rows = site.panels.transpose(2, 3).reshape(2, 48, 5)
    assert torch.equal(rows[:, :40], site.a)
    assert not rows[:, 40:].any()
    site.clear(0)
    assert not site.panels[0].any()


def test_clear_wipes_everything():
    site = fill(small(), {0: 8, 1: 3})
    site.clear(0)
    assert not site.a[0].any()
    assert not site.b[0].any()
    assert site.rank.tolist() == site.ranks == [0, 3, 0]
    assert site.scale[0] == site.scales[0] == 0.0
    assert site.a[1, :3].all()


def test_contents_change_but_addresses_do_not():
    site = small()
    tensors = (site.a, site.b, site.row0, site.rank, site.scale)
    before = [tensor.data_ptr() for tensor in tensors]
    fill(site, {0: 8, 2: 1})
    site.clear(2)
    now = (site.a, site.b, site.row0, site.rank, site.scale)
    assert [tensor.data_ptr() for tensor in now] == before


def test_load_works_outside_the_inference_mode_it_was_allocated_in():
    with torch.inference_mode():
        site = small()
    fill(site, {1: 4})
    site.clear(1)
    assert site.ranks == [0, 0, 0]


def test_allocation_takes_no_memory_until_written():
    statm = Path("/proc/self/statm")
    before = int(statm.read_text().split()[1])
    site = LoraSite.allocate(64, 64, 65536, 64, torch.bfloat16, "cpu")  # 512 MiB of `a`
    pages = int(statm.read_text().split()[1]) - before
    assert pages < 4096, f"{pages} pages became resident"
    assert not site.a[63, 63].any()


@pytest.mark.parametrize(
    ("slot", "a", "b", "scale", "message"),
    [
        (3, (2, 5), (7, 2), 1.0, r"slot is 3, wanted 0..2"),
        (-1, (2, 5), (7, 2), 1.0, r"slot is -1"),
        (0, (9, 5), (7, 9), 1.0, r"a is \[9, 5\], wanted \[1..8, 5\]"),
        (0, (0, 5), (7, 0), 1.0, r"a is \[0, 5\]"),
        (0, (2, 6), (7, 2), 1.0, r"a is \[2, 6\]"),
        (0, (5,), (7, 2), 1.0, r"a is \[5\]"),
        (0, (2, 5), (2, 7), 1.0, r"b is \[2, 7\], wanted \[7, 2\]"),
        (0, (2, 5), (7, 2), float("inf"), r"scale is inf"),
    ],
)
def test_load_names_mistakes_and_changes_nothing(slot, a, b, scale, message):
    site = small()
    with pytest.raises(ValueError, match=message):
        site.load(slot, torch.ones(a), torch.ones(b), scale)
    assert site.ranks == [0, 0, 0]
    assert not site.a.any()


def test_allocate_names_mistakes():
    with pytest.raises(ValueError, match=r"\(slots, max_rank, in, out\) is \(0, 8, 5, 7\)"):
        LoraSite.allocate(0, 8, 5, 7, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"dtype is torch.int8"):
        LoraSite.allocate(1, 8, 5, 7, torch.int8, "cpu")
