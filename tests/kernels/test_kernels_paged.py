"""The reference of paged attention against torch's own and against the CPU's rows."""

from __future__ import annotations

import pytest
import torch
from attention_cases import CASES, MIXED, UNTOUCHED, make
from lora_cases import assert_close
from torch.nn.functional import scaled_dot_product_attention

from lorabatch_kernels import attend_reference
from lorabatch_kernels.paged import attend_paged, store_paged


def attended(case, batch):
    store_paged(batch.keys, batch.values, batch.key, batch.value, batch.index)
    read = (batch.query, batch.keys, batch.values, batch.spans)
    attend_paged(batch.out, *read, **case.options(batch))
    return batch.out


def in_a_row(pool, batch, run):
    """[1, Hkv, length, D] of one run."""
    length, size = int(batch.spans.lengths[run]), pool.shape[2]
    place = [int(batch.spans.blocks[run, p // size]) * size + p % size for p in range(length)]
    return pool.flatten(1, 2)[:, place].contiguous()


@pytest.mark.parametrize("name", [name for name in CASES if name != "only padding"])
def test_against_the_rows_of_a_cpu(name):
    case = CASES[name]
    batch = make(case, torch.float32)
    out = attended(case, batch)
    for run, (count, past) in enumerate(case.runs):
        if count:
            start = int(batch.spans.starts[run])
            keys, values = (in_a_row(pool, batch, run) for pool in (batch.keys, batch.values))
            options = case.options(batch)
            wanted = attend_reference(batch.query, keys, values, (start, count, past, 0), **options)
            assert_close(f"run {run}", wanted, out[start : start + count], 2e-6)
    assert out[batch.tokens :].eq(UNTOUCHED).all()


def test_against_torch():
    batch = make(MIXED, torch.float32)
    out = attended(MIXED, batch)
    keys, values = (in_a_row(pool, batch, 1)[None] for pool in (batch.keys, batch.values))
    query = batch.query[None, :, 1:20]
    scale = MIXED.options(batch)["scale"]
    wanted = scaled_dot_product_attention(
        query, keys, values, is_causal=True, scale=scale, enable_gqa=True
    )
    assert_close("o", wanted[0].transpose(0, 1), out[1:20], 2e-6)


def test_only_named_places_are_stored():
    batch = make(MIXED, torch.float32)
    before = batch.keys.clone()
    store_paged(batch.keys, batch.values, batch.key, batch.value, batch.index)
    changed = (batch.keys != before) & ~(batch.keys.isnan() & before.isnan())
    places = changed.flatten(1, 2).any(-1).any(0).nonzero()[:, 0].tolist()
    assert places == sorted(batch.index[batch.index >= 0].tolist())
