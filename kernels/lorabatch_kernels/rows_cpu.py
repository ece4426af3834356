"""Row by row work between the products of a decoder layer, on a CPU in C (native/rows.c).

    rms_norm(x, weight)   weight * x / sqrt(mean(x^2) + epsilon), the quotient rounded to x's dtype
    silu_gate(x)          silu(x[..., :width]) * x[..., width:], silu rounded to x's dtype
    rotary_(x, cos, sin)  in place, x * cos + (-second half of x, first half of x) * sin, each head

Shapes and dtypes: fp32 or bf16 alike; x [tokens, width], [tokens, 2 * width], and for rotary_
[tokens, heads * width] with any row stride and cos, sin [tokens, width]. Everything else is
contiguous. Sums are fp32.

Raises nothing: callers ask `native.library()` and `native.supports` first, and pass what is written
above. Does not cover: gradients; rotary embeddings of part of a head or of interleaved pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorabatch_kernels import native

__all__ = ["rms_norm", "rotary_", "silu_gate"]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x [..., width] -> the same."""
    library = native.library()
    assert library is not None
    out = torch.empty_like(x)
    width = x.shape[-1]
    where = (out.data_ptr(), x.data_ptr(), weight.data_ptr())
    half = native.is_half(x.dtype)
    library.lorabatch_rms_norm(*where, x.numel() // width, width, epsilon, half)
    return out


def silu_gate(x: Tensor) -> Tensor:
    """x [..., 2 * width] -> [..., width]."""
    library = native.library()
    assert library is not None
    width = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    rows, half = out.numel() // width, native.is_half(x.dtype)
    library.lorabatch_silu_gate(out.data_ptr(), x.data_ptr(), rows, width, half)
    return out


def rotary_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """x [tokens, heads * width], cos and sin [tokens, width]."""
    library = native.library()
    assert library is not None
    tokens, width = cos.shape
    library.lorabatch_rotary(
        x.data_ptr(),
        x.stride(0),
        x.shape[1] // width,
        cos.data_ptr(),
        sin.data_ptr(),
        tokens,
        width,
        native.is_half(x.dtype),
    )
