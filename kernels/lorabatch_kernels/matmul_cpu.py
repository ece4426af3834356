"""A linear layer's product on a CPU: y = x W^T + bias, over weights laid out once.

The C kernel (native/matmul.c) reads panels of 32 outputs. Shapes: weight [out, in], bias [out],
x [..., in] -> y [..., out], all in one dtype, fp32 or bf16. Sums are fp32 and rounded once; a row
of y does not depend on the other rows, not even in rounding. bf16 takes an even number of inputs.

Raises ValueError for an x of another dtype; callers ask `can_pack` first. Does not cover:
gradients; AMX units (oneDNN's products have them).
"""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import addressof

import torch.nn.functional as F
from torch import Tensor

from lorabatch_kernels import native

__all__ = ["PackedWeight"]

BLOCK = 512


class PackedWeight:
    """A weight in panels, and its product."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.panels = _panels(weight)
        self.bias = None if bias is None else bias.contiguous()
        self.struct = native.Weight(
            self.panels.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            self.in_features,
            self.out_features,
        )

    @staticmethod
    def can_pack(weight: Tensor) -> bool:
        """Whether there is a kernel for it here, and nothing faster is known."""
        return (
            weight.device.type == "cpu"
            and native.supports(weight.dtype)
            and weight.shape[1] * weight.dtype.itemsize % 4 == 0
            and not (native.is_half(weight.dtype) and native.has("amx_bf16"))
            and native.library() is not None
        )

    def weight_blocks(self, first: int, count: int) -> Iterator[Tensor]:
        """Rows [first, first + count) of the weight, copies of some after the other, [n, in]."""
        together = 4 // self.panels.dtype.itemsize
        for row in range(first, first + count, BLOCK):
            panel, before = divmod(row, native.COLUMNS)
            end = min(row + BLOCK, first + count)
            panels = self.panels[panel : -(-end // native.COLUMNS)]
            cut = panels.view(len(panels), -1, native.COLUMNS, together)
            rows = cut.transpose(1, 2).reshape(-1, self.in_features)
            yield rows[before : before + end - row]

    def __call__(self, x: Tensor) -> Tensor:
        library = native.library()
        assert library is not None
        if x.dtype != self.panels.dtype:
            raise ValueError(f"x is {x.dtype}, wanted that of the weight, {self.panels.dtype}")
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.out_features)
        tokens, half = x.numel() // self.in_features, native.is_half(x.dtype)
        where = (y.data_ptr(), x.data_ptr(), addressof(self.struct))
        library.lorabatch_matmul(*where, tokens, half)
        return y


def _panels(weight: Tensor) -> Tensor:
    """[panels, in, 32], for bf16 [panels, in / 2, 32, 2]; zeros fill the last one up."""
    out, inner = weight.shape
    whole = F.pad(weight, (0, 0, 0, -out % native.COLUMNS))
    together = 4 // weight.dtype.itemsize
    cut = whole.view(-1, native.COLUMNS, inner // together, together)
    return cut.transpose(1, 2).contiguous()
