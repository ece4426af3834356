"""Attention on a CPU over a KV cache in which each sequence's positions lie side by side.

    out[t, h] = softmax(scale * q[h, t] . k[g]) v[g]      g the key-value head of query head h

over the positions of t's own sequence up to its own, or the last `window` of them. `attend_rows`
first stores the new keys and values. Decode tokens and chunks of prompts go in one call; a row's
result does not depend on what else is in it.

Shapes and dtypes, fp32 or bf16 alike: query [Hq, T, D], key [Hkv, T, D], value [Hkv, T, Dv], any
strides but the last; pools keys [Hkv, P, D], values [Hkv, P, Dv], contiguous; index int64 [T]; out
[T, Hq, Dv], contiguous; sinks [Hq]. Softmax and sums are fp32.

Raises nothing: `can_attend` says whether the kernel takes these sizes. Does not cover: gradients,
additive biases. Source: ours (native/attention.c), after the online softmax of Milakov and
Gimelshein, arXiv 1805.02867.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lorabatch_kernels import native


@dataclass(frozen=True)
class RowSpans:
    """Runs of new tokens, one a sequence: int64 [4, spans] of where each starts among the new
    tokens, how many it has, how many positions came before, and where in the pool position 0 is."""

    table: Tensor

    @classmethod
    def of(cls, spans: Sequence[tuple[int, int, int, int]]) -> RowSpans:
        """Of (start, count, past, first) a span."""
        return cls(torch.tensor(spans, dtype=torch.int64).view(-1, 4).t().contiguous())

    @cached_property
    def struct(self) -> native.Spans:
        return native.Spans(*(row.data_ptr() for row in self.table), self.table.shape[1])


def can_attend(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend_rows` works on this machine for such a query, key and value."""
    heads, _, width = query.shape
    return (
        query.device.type == "cpu"
        and native.supports(query.dtype)
        and query.dtype == key.dtype == value.dtype
        and width == key.shape[2]
        and width % 16 == 0 == value.shape[2] % 16
        and max(width, value.shape[2]) <= native.MAX_WIDTH
        and heads // key.shape[0] <= native.MAX_GROUP
        and native.library() is not None
    )


def attend_rows(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    spans: RowSpans,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Store key and value at `index`, then write every token's attention into `out`."""
    library = native.library()
    assert library is not None
    query, key, value = (_by_rows(x) for x in (query, key, value))
    sinks = None if sinks is None else sinks.to(query.dtype).contiguous()
    made = native.Attention(
        *(native.View(x.data_ptr(), x.stride(0), x.stride(1)) for x in (query, key, value)),
        *(x.data_ptr() for x in (keys, values, index, out)),
        None if sinks is None else sinks.data_ptr(),
        *(query.shape[1], query.shape[0], key.shape[0], query.shape[2], value.shape[2]),
        *(keys.shape[1], window or 0, scale, softcap or 0.0),
    )
    half = native.is_half(query.dtype)
    library.lorabatch_attention(addressof(made), addressof(spans.struct), half)


def _by_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def attend_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    span: tuple[int, int, int, int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """fp32 [count, Hq, Dv]: what `attend_rows` should write for one span, with the new keys and
    values in the pools."""
    start, count, past, first = span
    heads, groups = query.shape[0], query.shape[0] // keys.shape[0]
    made = torch.empty(count, heads, values.shape[-1])
    for i in range(count):
        end = past + i + 1
        begin = 0 if window is None else max(0, end - window)
        for head in range(heads):
            own = slice(first + begin, first + end)
            k, v = (pool[head // groups, own].float() for pool in (keys, values))
            scores = (k @ query[head, start + i].float()) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head, None].float()])
            p = scores.softmax(dim=0)[: end - begin]
            made[i, head] = p @ v
    return made
