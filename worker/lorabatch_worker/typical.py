"""Locally typical sampling (Meister et al., arXiv 2202.00666), as transformers' warper does it.

Shapes: p [rows, vocabulary], not below 0; mass [rows]. Raises nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["typical"]


def typical(p: Tensor, mass: Tensor) -> Tensor:
    """The probabilities of the tokens whose surprise is closest to the expected one, until they
    have `mass` together; 0 for all others. Of those equally close to the last one all stay."""
    p = p / p.sum(dim=-1, keepdim=True)
    expected = torch.special.entr(p).sum(dim=-1, keepdim=True)
    off = (-p.log() - expected).abs()  # infinite for what was dropped before
    values, order = off.sort(dim=-1, stable=True)
    reached = p.gather(-1, order).cumsum(dim=-1)
    last = (reached < mass[:, None]).sum(dim=-1, keepdim=True).clamp_(max=p.shape[-1] - 1)
    return p.masked_fill(off > values.gather(-1, last), 0.0)
