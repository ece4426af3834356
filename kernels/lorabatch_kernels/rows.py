"""Row by row work between the products of a decoder layer: in C on a CPU, in Triton on a GPU.

    rms_norm(x, weight)   weight * x / sqrt(mean(x^2) + epsilon), the quotient rounded to x's dtype
    silu_gate(x)          silu(x[..., :width]) * x[..., width:], silu rounded to x's dtype
    rotary_(x, cos, sin)  in place, x * cos + (-second half of x, first half of x) * sin, each head

Shapes and dtypes, fp32 or bf16 alike: x [..., width], [..., 2 * width], and for rotary_
[tokens, heads * width] with any row stride and cos, sin [tokens, width]. Everything else is
contiguous. Sums are fp32.

Raises nothing: callers ask `can_do_rows` first, and pass what is written above. Does not cover:
gradients; rotary embeddings of part of a head or of interleaved pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorabatch_kernels import native, rows_cpu

__all__ = ["can_do_rows", "rms_norm", "rotary_", "silu_gate"]


def can_do_rows(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether these functions work on such tensors on this machine."""
    if device.type == "cuda":
        return dtype in (torch.float32, torch.bfloat16, torch.float16)
    return device.type == "cpu" and native.supports(dtype) and native.library() is not None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x [..., width] -> the same."""
    if x.is_cuda:
        from lorabatch_kernels import rows_triton  # a CPU process needs no triton

        return rows_triton.rms_norm(x, weight, epsilon)
    return rows_cpu.rms_norm(x, weight, epsilon)


def silu_gate(x: Tensor) -> Tensor:
    """x [..., 2 * width] -> [..., width]."""
    if x.is_cuda:
        from lorabatch_kernels import rows_triton

        return rows_triton.silu_gate(x)
    return rows_cpu.silu_gate(x)


def rotary_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """x [tokens, heads * width], cos and sin [tokens, width]."""
    if x.is_cuda:
        from lorabatch_kernels import rows_triton

        rows_triton.rotary_(x, cos, sin)
        return
    rows_cpu.rotary_(x, cos, sin)
