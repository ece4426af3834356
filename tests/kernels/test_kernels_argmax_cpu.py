"""The most likely token of a row against torch's argmax."""

from __future__ import annotations

import pytest
import torch

from lorabatch_kernels import argmax, can_argmax

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
INF, NAN = float("inf"), float("nan")


@DTYPES
@pytest.mark.parametrize("width", [1, 15, 16, 511, 512, 513, 49_152, 50_257])
@pytest.mark.parametrize("rows", [1, 9])
def test_argmax_is_torchs(rows, width, dtype):
    draw = torch.Generator().manual_seed(width)
    # Few values, so that the highest is there several times: the first one counts.
    logits = torch.randint(-40, 40, (rows, width), generator=draw).to(dtype)
    assert torch.equal(argmax(logits), logits.float().argmax(dim=-1))
    distinct = torch.randn(rows, width, generator=draw).to(dtype)
    assert torch.equal(argmax(distinct), distinct.float().argmax(dim=-1))


@DTYPES
@pytest.mark.parametrize("place", [0, 17, 699])
def test_a_row_that_cannot_be_believed_is_named(dtype, place):
    logits = torch.randn(6, 700, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = logits.float().argmax(dim=-1)
    logits[1, place], logits[3, place], logits[4] = NAN, INF, -INF
    logits[2, place] = -INF
    wanted[[1, 3, 4]] = -1
    wanted[2] = logits[2].float().argmax()
    assert argmax(logits).tolist() == wanted.tolist()


def test_what_there_is_no_kernel_for(monkeypatch):
    assert can_argmax(torch.zeros(2, 3))
    assert not can_argmax(torch.zeros(2, 3).half())
    assert not can_argmax(torch.zeros(3, 2).t())
    monkeypatch.setattr("lorabatch_kernels.native.library", lambda: None)
    assert not can_argmax(torch.zeros(2, 3))
