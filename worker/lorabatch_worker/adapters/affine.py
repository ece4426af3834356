"""What an adapter does to a layer's own output: gain and shift, of DoRA and of biases.

    PEFT:  m / |W + s B A| * (x W^T + s (x A^T) B^T) + bias          | | of each row
    here:  y + gain * y + shift + s (x A^T) B'^T                     y = x W^T + the base's bias

with 1 + gain = m / |W + s B A| (gain 0 without DoRA), B' = (1 + gain) * B, and shift = bias -
(1 + gain) * the base's bias + s * lora_B's bias, where `bias` is the adapter's own or the base's.
gain is small, so that little of it is lost where it is kept in bf16. Computed in fp32, once when
the adapter is read. Raises nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["BaseLayer", "affine_of", "gain_of"]


class BaseLayer(Protocol):
    """A linear layer of the base model."""

    @property
    def bias(self) -> Tensor | None:
        """[out]."""
        ...

    @property
    def out_features(self) -> int: ...

    def weight_blocks(self) -> Iterator[Tensor]:
        """The weight [out, in], some rows after the other."""
        ...


@torch.inference_mode()
def gain_of(layer: BaseLayer, a: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """fp32 [out] on the host: magnitude [out] over the norms of the rows of W + scale * b a, less
    1, of a [rank, in] and b [out, rank]."""
    norms, first = [], 0
    for rows in layer.weight_blocks():
        b_rows = b[first : first + len(rows)].to(rows.device, torch.float32)
        on_device = a.to(rows.device, torch.float32)
        whole = torch.addmm(rows.float(), b_rows, on_device, alpha=scale)
        norms.append(torch.linalg.vector_norm(whole, dim=1).cpu())
        first += len(rows)
    return magnitude.float() / torch.cat(norms) - 1


@torch.inference_mode()
def affine_of(
    layer: BaseLayer,
    gain: Tensor | None,
    bias: Tensor | None,
    term: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor] | None:
    """Gain and shift [out]; None where y stays as it is. `bias`: in place of the base's; `term`:
    added besides. dtype: in which the gain will be kept."""
    if gain is None and bias is None and term is None:
        return None
    zeros = torch.zeros(layer.out_features)
    base = zeros if layer.bias is None else layer.bias.float().cpu()
    gain = zeros if gain is None else gain.to(dtype).float()
    shift = (base if bias is None else bias.float()) - base - gain * base
    return gain, shift if term is None else shift + term.float()
