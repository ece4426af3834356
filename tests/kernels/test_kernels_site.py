"""A LoRA site: contents change, addresses do not, and nothing stale survives."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from lora_cases import fill

from lorabatch_kernels import LoraSite, LoraWeights, SiteGroup

LAYOUTS = pytest.mark.parametrize("paneled", [True, False], ids=["panels", "rows"])


def made(*sizes, dtype=torch.float32, **options) -> LoraSite:
    """A site by itself of (slots, max_rank, in, out)."""
    *others, out = sizes
    return SiteGroup.allocate(*others, [out], dtype, "cpu", **options).sites[0]


def small(paneled: bool = True) -> LoraSite:
    return made(3, 8, 5, 7, paneled=paneled)


@LAYOUTS
def test_load_puts_rank_rows_and_tables(paneled):
    site = small(paneled)
    a, b = torch.randn(3, 5), torch.randn(7, 3)
    site.load(1, a, b, 0.3)
    rows = site.rows(1)
    assert torch.equal(rows[0], a)
    assert torch.equal(rows[1], b.t())
    assert (site.ranks, site.scales) == ([0, 3, 0], [0.0, 0.3, 0.0])
    if paneled:
        assert [entry.rank for entry in site.table] == [0, 3, 0]
        assert site.table[1].scale == pytest.approx(0.3)
    else:
        assert site.rank.tolist() == [0, 3, 0]
        assert site.row0.tolist() == [0, 10, 20]
        assert site.scale.tolist() == pytest.approx([0.0, 0.3, 0.0])
        assert (site.rank.dtype, site.row0.dtype) == (torch.int32, torch.int32)
        assert site.scale.dtype == torch.float32


def test_a_slot_of_a_cpu_points_to_the_adapter_s_own_memory():
    site = small()
    weights = LoraWeights.pack(torch.ones(2, 5), torch.ones(7, 2), 1.0)
    site.put(1, weights)
    assert (site.table[1].a, site.table[1].b) == weights.addresses
    kept = weakref.ref(weights.memory)
    del weights
    gc.collect()
    assert kept() is not None
    site.clear(1)
    gc.collect()
    assert kept() is None
    assert (site.table[1].a, site.table[1].rank, site.ranks[1]) == (None, 0, 0)


def test_adapters_lie_anywhere_in_a_pool_and_take_their_rank_alone():
    site = made(3, 8, 5, 7, paneled=False, pool_rows=11)
    assert (site.a.shape, site.b.shape) == ((11, 5), (11, 7))
    adapters = {}
    for slot, (start, rank) in {2: (0, 3), 0: (10, 1), 1: (3, 7)}.items():
        adapters[slot] = torch.randn(rank, 5), torch.randn(7, rank)
        site.load(slot, *adapters[slot], 1.0, start)
    assert site.row0.tolist() == site.starts == [10, 3, 0]
    site.clear(0)
    site.load(0, torch.ones(1, 5), torch.ones(7, 1), 1.0, 10)
    for slot in (1, 2):
        a, b = site.rows(slot)
        assert torch.equal(a, adapters[slot][0])
        assert torch.equal(b, adapters[slot][1].t())


@pytest.mark.parametrize(("paneled", "start"), [(False, -1), (False, 29), (True, 0), (True, 9)])
def test_a_start_that_does_not_fit_is_named(paneled, start):
    site = small(paneled)
    with pytest.raises(ValueError, match=rf"start is {start}, .*wanted|start is {start}, wanted"):
        site.load(1, torch.ones(2, 5), torch.ones(7, 2), 1.0, start)
    assert site.ranks == [0, 0, 0]
    assert paneled or site.starts == [0, 10, 20]


def test_a_pool_holds_the_largest_adapter():
    with pytest.raises(ValueError, match=r"pool_rows is 9, wanted max_rank \+ 2, 10, or more"):
        made(3, 8, 5, 7, paneled=False, pool_rows=9)


@LAYOUTS
def test_gain_and_shift_come_and_go(paneled):
    site = small(paneled)
    gain, shift = torch.randn(7), torch.randn(7)
    site.load(1, torch.randn(8, 5), torch.randn(7, 8), 1.0, affine=(gain, shift))
    assert site.affines == [False, True, False]
    table = [entry.affine for entry in site.table] if paneled else site.affine.tolist()
    assert table == [0, 1, 0]
    for row, wanted in zip(site.affine_rows(1), (gain, shift), strict=True):
        assert torch.equal(row, wanted)
    site.load(1, torch.randn(0, 5), torch.randn(7, 0), 1.0, affine=(shift, gain))
    assert site.changes(1)
    assert torch.equal(site.affine_rows(1)[0], shift)
    site.load(1, torch.randn(2, 5), torch.randn(7, 2), 1.0)
    assert site.affine_rows(1) is None
    site.clear(1)
    assert not site.changes(1)
    assert not any(e.affine for e in site.table) if paneled else not site.affine.any()


def test_a_gain_of_another_size_is_named():
    with pytest.raises(ValueError, match=r"gain or shift is \[6\], wanted \[7\]"):
        small().load(
            1, torch.ones(2, 5), torch.ones(7, 2), 1.0, affine=(torch.ones(7), torch.ones(6))
        )


@LAYOUTS
def test_clear_empties_one_slot(paneled):
    site = fill(small(paneled), {0: 8, 1: 3})
    site.clear(0)
    assert (site.ranks, site.scales[0], site.changes(0)) == ([0, 3, 0], 0.0, False)
    assert [len(part) for part in site.rows(0)] == [0, 0]
    assert site.rows(1)[0].all()


def test_contents_change_but_addresses_do_not():
    site = small(paneled=False)
    tensors = (site.a, site.b, site.row0, site.rank, site.scale)
    before = [tensor.data_ptr() for tensor in tensors]
    fill(site, {0: 8, 2: 1})
    site.clear(2)
    now = (site.a, site.b, site.row0, site.rank, site.scale)
    assert [tensor.data_ptr() for tensor in now] == before
    site = small()
    before = site.address
    fill(site, {0: 8, 2: 1})
    assert site.address == before


def test_load_works_outside_the_inference_mode_it_was_allocated_in():
    with torch.inference_mode():
        site = small()
    fill(site, {1: 4})
    site.clear(1)
    assert site.ranks == [0, 0, 0]


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
    assert all(entry.a is None for entry in site.table)


@pytest.mark.parametrize(
    ("sizes", "dtype", "message"),
    [
        ((2, 6, 7), torch.float32, r"\(in, out, dtype\) of the weights is \(6, 7, torch.float32\)"),
        ((2, 5, 6), torch.float32, r"is \(5, 6, torch.float32\), wanted \(5, 7, torch.float32\)"),
        ((2, 5, 7), torch.bfloat16, r"is \(5, 7, torch.bfloat16\), wanted \(5, 7, torch.float32\)"),
        ((9, 5, 7), torch.float32, r"rank is 9, wanted 0..8"),
    ],
)
@LAYOUTS
def test_put_names_mistakes_and_changes_nothing(sizes, dtype, message, paneled):
    rank, wide, out = sizes
    a, b = torch.ones(rank, wide, dtype=dtype), torch.ones(out, rank)
    site = small(paneled)
    with pytest.raises(ValueError, match=message):
        site.put(1, LoraWeights.pack(a, b, 1.0, paneled=paneled))
    assert site.ranks == [0, 0, 0]


def test_allocate_names_mistakes():
    with pytest.raises(ValueError, match=r"\(slots, max_rank, in, out\) is \(0, 8, 5, 7\)"):
        made(0, 8, 5, 7)
    with pytest.raises(ValueError, match=r"dtype is torch.int8"):
        made(1, 8, 5, 7, dtype=torch.int8)
