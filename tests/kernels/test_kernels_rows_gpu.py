"""Norm, gate and rotary embedding on a real GPU, against transformers' own."""

from __future__ import annotations

import pytest
import row_cases
import torch
from lora_cases import assert_close
from row_cases import GATES, HEADS, NORMS, TOLERANCE

from lorabatch_kernels import rms_norm, rotary_, silu_gate

DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@DTYPES
@pytest.mark.parametrize("shape", [*NORMS, (2048, 4096), (3, 16384)])
def test_rms_norm(shape, dtype):
    x, weight, wanted = row_cases.norm(shape, dtype, "cuda")
    assert_close("norm", wanted, rms_norm(x, weight, 1e-5).float(), TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("shape", [*GATES, (2048, 14336)])
@pytest.mark.parametrize("size", [1.0, 60.0])
def test_silu_gate(shape, size, dtype):
    x, wanted = row_cases.gate(shape, size, dtype, "cuda")
    assert_close("gate", wanted, silu_gate(x).float(), TOLERANCE[dtype])


def test_silu_gate_of_what_is_not_finite():
    x = row_cases.not_finite("cuda")
    wanted, got = row_cases.gated(x), silu_gate(x)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(), wanted.nan_to_num())


@DTYPES
@pytest.mark.parametrize(("tokens", "heads", "width"), [*HEADS, (2048, 40, 128), (9, 72, 80)])
def test_rotary(tokens, heads, width, dtype):
    whole, cos, sin, wanted = row_cases.rotary(tokens, heads, width, dtype, "cuda")
    before, end = whole.clone(), 3 + heads * width
    rotary_(whole[:, 3:end], cos, sin)
    wanted, got = wanted[:, 3:end].float(), whole[:, 3:end].float()
    assert_close("rotary", wanted, got, 2 * TOLERANCE[dtype])
    assert torch.equal(whole[:, :3], before[:, :3])
    assert torch.equal(whole[:, end:], before[:, end:])
