"""The base model's matrix products, with weights in the layout that this machine reads fastest.

On a CPU that is the panels of our own kernel; where that cannot be, oneDNN's layout, by operators
that are torch's own but not its public API, so they are tried first and checked against the plain
product (docs/decisions/0009). Elsewhere weights stay as they are. Shapes: weight [out, in], bias
[out], x [..., in] -> [..., out]. Raises nothing of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorabatch_kernels import PackedWeight

__all__ = ["Dense", "SharedInput"]

# The GEMM that oneDNN lays a weight out for; another batch size runs as well.
PACK_TOKENS = 64
BLOCK = 512  # rows of a weight that are looked at together


class Dense(nn.Module):
    """x W^T + bias. Takes over `weight`; drop your own reference to it to save memory."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.product: PackedWeight | Reordered | Plain
        self.bias = bias
        # Some models look at a projection's dtype and device.
        self.weight = weight.new_empty(0)
        if PackedWeight.can_pack(weight):
            self.product = PackedWeight(weight, bias)
        elif can_reorder(weight.device.type, weight.dtype):
            self.product = Reordered(weight, bias)
        else:
            self.weight = weight
            self.product = Plain(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)

    def weight_blocks(self, first: int, count: int) -> Iterator[Tensor]:
        """Rows [first, first + count) of the weight, BLOCK after BLOCK, [<= BLOCK, in]."""
        return self.product.weight_blocks(first, count)


class Plain:
    """The weight as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def weight_blocks(self, first: int, count: int) -> Iterator[Tensor]:
        yield from torch.split(self.weight[first : first + count], BLOCK)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Reordered:
    """The weight in oneDNN's layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        with torch.inference_mode():
            self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(
                weight.contiguous(), PACK_TOKENS
            )
        self.bias = bias
        self.in_features = weight.shape[1]

    def weight_blocks(self, first: int, count: int) -> Iterator[Tensor]:
        """Of its product with ones in places, which is exact."""
        ones = torch.eye(self.in_features, dtype=self.weight.dtype)
        columns: Tensor = torch.ops.mkldnn._linear_pointwise(
            ones, self.weight, None, "none", [], ""
        )
        yield from torch.split(columns[:, first : first + count].t(), BLOCK)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


class SharedInput:
    """Linear layers that are given the same input, multiplied as one at the first one's call."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        bias = None
        if any(b is not None for b in biases):
            zeros = [w.new_zeros(w.shape[0]) for w in weights]
            bias = torch.cat([z if b is None else b for b, z in zip(biases, zeros, strict=True)])
        # One weight of a GPU stays where it is: it may be the embedding's, too.
        alone = len(weights) == 1 and weights[0].device.type != "cpu"
        self.dense = Dense(weights[0] if alone else torch.cat(list(weights)), bias)
        self.widths = [w.shape[0] for w in weights]
        self._x: Tensor | None = None
        self._left = 0
        self._parts: Sequence[Tensor] = ()

    def part(self, x: Tensor, number: int, begin: Callable[[], Callable[[Tensor], None]]) -> Tensor:
        """Columns of layer `number`. `begin` is called before the product is made, and what it
        gives with the whole product."""
        if self._x is not x:
            then = begin()
            whole = self.dense(x)
            then(whole)
            self._parts = torch.split(whole, self.widths, dim=-1)
            self._x, self._left = x, len(self.widths)
        part = self._parts[number]
        self._left -= 1
        if self._left == 0:
            self._x, self._parts = None, ()
        return part


@cache
def can_reorder(device: str, dtype: torch.dtype) -> bool:
    """Whether oneDNN's product exists here and says what the plain one says."""
    if device != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 32, generator=generator).to(dtype)
    bias = torch.randn(48, generator=generator).to(dtype)
    x = torch.randn(2, 5, 32, generator=generator).to(dtype)
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        got = Reordered(weight, bias)(x)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    wanted = F.linear(x, weight, bias)
    return bool(torch.allclose(got, wanted, rtol=2e-2, atol=1e-4 if dtype.itemsize == 4 else 5e-2))
