"""Row by row work between the products of a decoder layer, on a CPU in C (native/rows.c): see
rows.py. fp32 or bf16. Raises nothing: `native.library()` is there and `native.supports` the dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorabatch_kernels import native


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    library = native.library()
    assert library is not None
    out = torch.empty_like(x)
    width = x.shape[-1]
    where = (out.data_ptr(), x.data_ptr(), weight.data_ptr())
    half = native.is_half(x.dtype)
    library.lorabatch_rms_norm(*where, x.numel() // width, width, epsilon, half)
    return out


def silu_gate(x: Tensor) -> Tensor:
    library = native.library()
    assert library is not None
    width = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    rows, half = out.numel() // width, native.is_half(x.dtype)
    library.lorabatch_silu_gate(out.data_ptr(), x.data_ptr(), rows, width, half)
    return out


def rotary_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
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
