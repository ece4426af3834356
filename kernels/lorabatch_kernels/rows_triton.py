"""Row by row work between the products of a decoder layer, on a GPU in Triton: see rows.py.

Shapes and dtypes: as rows.py, and fp16. Sums are fp32. One launch each, safe to capture in a CUDA
graph. Triton launches on the current device: make the tensors' device the current one.

Raises nothing of its own. Does not cover: rows wider than 65,536.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorabatch_kernels.plan import COMPILE_OPTIONS

GATE_BLOCK = 1024
ROTARY_BLOCK = 1024


@triton.jit
def rms_norm_kernel(out, x, weight, epsilon, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (rows,)."""
    d = tl.arange(0, BLOCK)
    inside = d < WIDTH
    row = tl.program_id(0).to(tl.int64) * WIDTH
    v = tl.load(x + row + d, mask=inside, other=0.0).to(tl.float32)
    quotient = v / tl.sqrt(tl.sum(v * v, 0) / WIDTH + epsilon)
    rounded = quotient.to(x.dtype.element_ty).to(tl.float32)
    scaled = rounded * tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + d, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def silu_gate_kernel(out, x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (rows, column blocks)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < WIDTH
    at = x + row * 2 * WIDTH + d
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + row * WIDTH + d, (silu * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotary_kernel(
    x,
    x_stride,
    cos,
    sin,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (tokens, blocks of heads): lane d of a head pairs with lane d + HALF."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    turn = token * 2 * HALF + d
    low, high = d < HALF, (head < HEADS)[:, None] & (d < HALF)[None, :]
    at = x + token * x_stride + head[:, None] * (2 * HALF) + d[None, :]
    a = tl.load(at, mask=high, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=high, other=0.0).to(tl.float32)
    cos_a = tl.load(cos + turn, mask=low, other=0.0).to(tl.float32)[None, :]
    cos_b = tl.load(cos + turn + HALF, mask=low, other=0.0).to(tl.float32)[None, :]
    sin_a = tl.load(sin + turn, mask=low, other=0.0).to(tl.float32)[None, :]
    sin_b = tl.load(sin + turn + HALF, mask=low, other=0.0).to(tl.float32)[None, :]
    tl.store(at, (a * cos_a - b * sin_a).to(x.dtype.element_ty), mask=high)
    tl.store(at + HALF, (b * cos_b + a * sin_b).to(x.dtype.element_ty), mask=high)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    out = torch.empty_like(x)
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    if x.numel():
        rms_norm_kernel[(x.numel() // width,)](
            *(out, x, weight, epsilon),
            WIDTH=width,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
            **COMPILE_OPTIONS,
        )
    return out


def silu_gate(x: Tensor) -> Tensor:
    width = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    if x.numel():
        silu_gate_kernel[(out.numel() // width, triton.cdiv(width, GATE_BLOCK))](
            *(out, x), WIDTH=width, BLOCK=GATE_BLOCK, **COMPILE_OPTIONS
        )
    return out


def rotary_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    tokens, width = cos.shape
    heads, half = x.shape[1] // width, triton.next_power_of_2(width // 2)
    block = min(triton.next_power_of_2(heads), max(1, ROTARY_BLOCK // half))
    if tokens:
        rotary_kernel[(tokens, triton.cdiv(heads, block))](
            *(x, x.stride(0), cos, sin),
            HEADS=heads,
            HALF=width // 2,
            BLOCK_H=block,
            BLOCK_D=half,
            **COMPILE_OPTIONS,
        )
