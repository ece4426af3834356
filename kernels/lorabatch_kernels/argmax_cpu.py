"""The most likely token of each row of logits on a CPU, in one pass of C (native/rows.c).

Shapes and dtypes: logits [rows, vocabulary], fp32 or bf16, contiguous -> int64 [rows]: the first of
the highest; -1 in a row that holds a NaN, or whose highest value is not finite.

Raises nothing: callers ask `can_argmax` first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorabatch_kernels import native

__all__ = ["argmax", "can_argmax"]


def can_argmax(logits: Tensor) -> bool:
    """Whether there is a kernel for them here."""
    return (
        logits.device.type == "cpu"
        and logits.is_contiguous()
        and native.supports(logits.dtype)
        and native.library() is not None
    )


def argmax(logits: Tensor) -> Tensor:
    library = native.library()
    assert library is not None
    rows, width = logits.shape
    out = torch.empty(rows, dtype=torch.int64)
    half = native.is_half(logits.dtype)
    library.lorabatch_argmax(out.data_ptr(), logits.data_ptr(), rows, width, half)
    return out
