"""Norm, gate and rotary embedding in triton's interpreter, against transformers' own.

Not collected by name: test_kernels_triton.py runs this file in a process with TRITON_INTERPRET=1.
fp16 and fp32 only: triton 3.9 interprets a rounding to bf16 as a cut.
"""

from __future__ import annotations

import pytest
import row_cases
import torch
from lora_cases import assert_close
from row_cases import TOLERANCE

from lorabatch_kernels.rows_triton import rms_norm, rotary_, silu_gate

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 2, 576), (1, 7, 37), (3, 5)])
def test_rms_norm(shape, dtype):
    x, weight, wanted = row_cases.norm(shape, dtype)
    assert_close("norm", wanted, rms_norm(x, weight, 1e-5).float(), TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("shape", [(1, 2, 1536), (1, 7, 37)])
def test_silu_gate(shape, dtype):
    x, wanted = row_cases.gate(shape, 1.0, dtype)
    assert_close("gate", wanted, silu_gate(x).float(), TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize(("tokens", "heads", "width"), [(2, 3, 64), (5, 2, 10), (1, 40, 128)])
def test_rotary(tokens, heads, width, dtype):
    whole, cos, sin, wanted = row_cases.rotary(tokens, heads, width, dtype)
    before, end = whole.clone(), 3 + heads * width
    rotary_(whole[:, 3:end], cos, sin)
    wanted, got = wanted[:, 3:end].float(), whole[:, 3:end].float()
    assert_close("rotary", wanted, got, 2 * TOLERANCE[dtype])
    assert torch.equal(whole[:, :3], before[:, :3])
    assert torch.equal(whole[:, end:], before[:, end:])


def test_no_tokens():
    empty = torch.zeros(0, 64)
    assert rms_norm(empty, torch.ones(64), 1e-5).shape == (0, 64)
    assert silu_gate(empty).shape == (0, 32)
    rotary_(empty, torch.zeros(0, 32), torch.zeros(0, 32))
