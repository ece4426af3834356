"""Norm, gate and rotary embedding against transformers' own."""

from __future__ import annotations

import pytest
import torch
from lora_cases import assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from lorabatch_kernels import rms_norm, rotary_, silu_gate

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
TOLERANCE = {torch.float32: 5e-7, torch.bfloat16: 3e-3}


def fresh(*shape, dtype, size=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(5)) * size).to(dtype)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 576), (1, 300, 64), (1, 7, 37), (1, 2, 5)])
def test_rms_norm(shape, dtype):
    x, weight = fresh(*shape, dtype=dtype, size=3.0), fresh(shape[-1], dtype=dtype)
    layer = LlamaRMSNorm(shape[-1], eps=1e-5).to(dtype)
    layer.weight.data.copy_(weight)
    wanted = layer(x).detach()
    assert_close("norm", wanted.float(), rms_norm(x, weight, 1e-5).float(), TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 1536), (1, 300, 64), (1, 7, 37)])
@pytest.mark.parametrize("size", [1.0, 60.0])
def test_silu_gate(shape, size, dtype):
    x = fresh(*shape[:-1], 2 * shape[-1], dtype=dtype, size=size)
    gate, up = x.split(shape[-1], dim=-1)
    wanted = torch.nn.functional.silu(gate) * up
    assert_close("gate", wanted.float(), silu_gate(x).float(), TOLERANCE[dtype])


def test_silu_gate_of_what_is_not_finite():
    x = torch.tensor([[float("inf"), -float("inf"), float("nan"), -200.0, 1.0, 1.0, 1.0, 1.0]])
    x = torch.cat([x[:, :4].repeat(1, 8), x[:, 4:].repeat(1, 8)], dim=1)
    gate, up = x.split(32, dim=-1)
    wanted = torch.nn.functional.silu(gate) * up
    got = silu_gate(x)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(), wanted.nan_to_num())


@DTYPES
@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 3, 64), (300, 4, 32), (5, 2, 10)])
def test_rotary(tokens, heads, width, dtype):
    whole = fresh(tokens, heads * width + 7, dtype=dtype)
    x = whole[:, 3 : 3 + heads * width]
    angle = torch.rand(tokens, width // 2, generator=torch.Generator().manual_seed(6)) * 6
    cos, sin = (torch.cat([f(angle)] * 2, dim=-1).to(dtype) for f in (torch.cos, torch.sin))
    by_heads = x.reshape(1, tokens, heads, width).transpose(1, 2)
    wanted, _ = apply_rotary_pos_emb(by_heads, by_heads, cos[None], sin[None])
    before = whole.clone()
    rotary_(x, cos, sin)
    got = x.reshape(1, tokens, heads, width).transpose(1, 2)
    assert_close("rotary", wanted.float(), got.float(), 2 * TOLERANCE[dtype])
    assert torch.equal(whole[:, :3], before[:, :3])
    assert torch.equal(whole[:, 3 + heads * width :], before[:, 3 + heads * width :])
