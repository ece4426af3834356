"""Norm, gate and rotary embedding, and what transformers makes of them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

NORMS = [(1, 1, 576), (1, 300, 64), (1, 7, 37), (1, 2, 5)]
GATES = [(1, 1, 1536), (1, 300, 64), (1, 7, 37)]
HEADS = [(1, 3, 64), (300, 4, 32), (5, 2, 10)]  # tokens, heads, width
TOLERANCE = {torch.float32: 5e-7, torch.float16: 4e-4, torch.bfloat16: 3e-3}


def fresh(*shape: int, dtype: torch.dtype, device: str, size: float = 1.0) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(5)) * size
    return drawn.to(device, dtype)


def norm(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and the norm for an epsilon of 1e-5."""
    x = fresh(*shape, dtype=dtype, device=device, size=3.0)
    weight = fresh(shape[-1], dtype=dtype, device=device)
    layer = LlamaRMSNorm(shape[-1], eps=1e-5).to(device, dtype)
    layer.weight.data.copy_(weight)
    return x, weight, layer(x).detach().float()


def gate(
    shape: tuple[int, ...], size: float, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    x = fresh(*shape[:-1], 2 * shape[-1], dtype=dtype, device=device, size=size)
    return x, gated(x).float()


def gated(x: Tensor) -> Tensor:
    first, up = x.split(x.shape[-1] // 2, dim=-1)
    return torch.nn.functional.silu(first) * up


def not_finite(device: str = "cpu") -> Tensor:
    x = torch.tensor([[float("inf"), -float("inf"), float("nan"), -200.0, 1.0, 1.0, 1.0, 1.0]])
    return torch.cat([x[:, :4].repeat(1, 8), x[:, 4:].repeat(1, 8)], dim=1).to(device)


def rotary(
    tokens: int, heads: int, width: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A wider tensor whose columns 3 to 3 + heads * width are to turn; cos; sin; it turned."""
    whole = fresh(tokens, heads * width + 7, dtype=dtype, device=device)
    angle = torch.rand(tokens, width // 2, generator=torch.Generator().manual_seed(6)) * 6
    both = (torch.cat([f(angle)] * 2, dim=-1) for f in (torch.cos, torch.sin))
    cos, sin = (part.to(device, dtype) for part in both)
    turned = whole.clone()
    x = turned[:, 3 : 3 + heads * width]
    by_heads = x.reshape(1, tokens, heads, width).transpose(1, 2)
    wanted, _ = apply_rotary_pos_emb(by_heads, by_heads, cos[None], sin[None])
    x.copy_(wanted.transpose(1, 2).reshape(tokens, heads * width))
    return whole, cos, sin, turned
