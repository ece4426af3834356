"""Norm, gate and rotary embedding against transformers' own."""

from __future__ import annotations

import pytest
import row_cases
import torch
from lora_cases import assert_close
from row_cases import GATES, HEADS, NORMS, TOLERANCE

from lorabatch_kernels import can_do_rows, rms_norm, rotary_, silu_gate

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@DTYPES
@pytest.mark.parametrize("shape", NORMS)
def test_rms_norm(shape, dtype):
    x, weight, wanted = row_cases.norm(shape, dtype)
    assert_close("norm", wanted, rms_norm(x, weight, 1e-5).float(), TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("shape", GATES)
@pytest.mark.parametrize("size", [1.0, 60.0])
def test_silu_gate(shape, size, dtype):
    x, wanted = row_cases.gate(shape, size, dtype)
    assert_close("gate", wanted, silu_gate(x).float(), TOLERANCE[dtype])


def test_silu_gate_of_what_is_not_finite():
    x = row_cases.not_finite()
    wanted, got = row_cases.gated(x), silu_gate(x)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(), wanted.nan_to_num())


@DTYPES
@pytest.mark.parametrize(("tokens", "heads", "width"), HEADS)
def test_rotary(tokens, heads, width, dtype):
    whole, cos, sin, wanted = row_cases.rotary(tokens, heads, width, dtype)
    before, end = whole.clone(), 3 + heads * width
    rotary_(whole[:, 3:end], cos, sin)
    wanted, got = wanted[:, 3:end].float(), whole[:, 3:end].float()
    assert_close("rotary", wanted, got, 2 * TOLERANCE[dtype])
    assert torch.equal(whole[:, :3], before[:, :3])
    assert torch.equal(whole[:, end:], before[:, end:])


def test_where_they_work():
    cpu = torch.device("cpu")
    assert can_do_rows(cpu, torch.bfloat16)
    assert not can_do_rows(cpu, torch.float16)
    assert can_do_rows(torch.device("cuda"), torch.float16)
    assert not can_do_rows(torch.device("cuda"), torch.float64)
    assert not can_do_rows(torch.device("meta"), torch.float32)
