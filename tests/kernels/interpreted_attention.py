"""Paged attention in triton's interpreter, on the CPU, against its torch reference.

Not collected by name: test_kernels_triton.py runs this file in a process with TRITON_INTERPRET=1.
fp16 and fp32 only, as interpreted_kernels.py; and triton 3.6 interprets a loop whose bounds it
loads with numpy < 2.4 only.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import CASES, DECODE, MIXED, UNTOUCHED, Attention, Batch, make
from lora_cases import assert_close, same_bits

from lorabatch_kernels import paged_triton
from lorabatch_kernels.paged import attend_paged_reference, store_paged
from lorabatch_kernels.paged_triton import attend, store
from lorabatch_kernels.plan import AttentionPlan

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
SMALL = AttentionPlan(block_m=16, block_n=16, num_warps=4, num_stages=1)


def check(case: Attention, batch: Batch, dtype: torch.dtype) -> None:
    store_paged(batch.keys, batch.values, batch.key, batch.value, batch.index)
    read = (batch.query, batch.keys, batch.values, batch.spans)
    wanted = torch.empty_like(batch.out, dtype=torch.float32)
    attend_paged_reference(wanted, *read, **case.options(batch))
    attend(batch.out, *read, **case.options(batch))
    assert batch.out[batch.tokens :].eq(UNTOUCHED).all()
    if batch.tokens:
        assert_close("o", wanted[: batch.tokens], batch.out[: batch.tokens], TOLERANCE[dtype])


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(paged_triton, "attention_plan", lambda *args: SMALL)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_store(name, dtype):
    batch = make(CASES[name], dtype)
    keys, values = batch.keys.clone(), batch.values.clone()
    store_paged(keys, values, batch.key, batch.value, batch.index)
    store(batch.keys, batch.values, batch.key, batch.value, batch.index)
    assert same_bits(batch.keys, keys)
    assert same_bits(batch.values, values)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_attend(name, dtype):
    check(CASES[name], make(CASES[name], dtype), dtype)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("splits", [2, 8])
@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("decode")])
def test_attend_in_splits(name, splits, monkeypatch):
    monkeypatch.setattr(paged_triton, "splits_for", lambda *args: splits)
    check(CASES[name], make(CASES[name], torch.float32), torch.float32)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("case", [MIXED, DECODE, Attention(((70, 5),), width=80)], ids=str)
def test_its_own_plan(case, dtype):
    check(case, make(case, dtype), dtype)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("case", [MIXED, DECODE], ids=["mixed", "decode"])
def test_any_strides_but_the_last(case, monkeypatch):
    monkeypatch.setattr(paged_triton, "splits_for", lambda *args: 2)
    batch = make(case, torch.float32)
    heads_first = batch.query.contiguous(), batch.key.contiguous(), batch.value.contiguous()
    pools = torch.full((*batch.keys.shape[:3], 77), float("nan")).transpose(0, 1).contiguous()
    pools = pools.transpose(0, 1)
    keys, values = pools[..., 3:35], pools[..., 40:72]
    keys.copy_(batch.keys)
    values.copy_(batch.values)
    out = torch.full((*batch.out.shape[:2], 50), UNTOUCHED)
    strided = Batch(*heads_first, keys, values, batch.index, batch.spans, None, out[..., 9:41])
    store(keys, values, *heads_first[1:], batch.index)
    check(case, strided, torch.float32)
    assert out[..., :9].eq(UNTOUCHED).all()
    assert out[..., 41:].eq(UNTOUCHED).all()
