"""Attention over the KV cache, for every model that dispatches through transformers' attention
interface.

One function serves decode tokens and prefill chunks of the same flat batch: it writes the new
keys and values into the layer's pools, then every token attends to its own sequence. Over blocks
that lie anywhere (a GPU) and over a CPU's rows one kernel does it all; a CPU without compiled
kernels goes through its rows one by one, in torch's operators. Softmax in float32. Handles grouped
queries, sliding windows, logit softcap and sinks; not covered: ALiBi and other additive biases,
cross attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from lorabatch_kernels import attend_rows, can_attend
from lorabatch_kernels.paged import attend_paged, store_paged
from lorabatch_worker.kv_cache import KVCache, Pool
from lorabatch_worker.step import Span, Step

__all__ = ["IMPLEMENTATION", "register"]

IMPLEMENTATION = "lorabatch_paged"


@dataclass(frozen=True)
class _Kind:
    """What a model wants of one layer's attention."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    @property
    def plain(self) -> bool:
        """Whether torch's own attention computes it."""
        return self.softcap is None and self.sinks is None


def register(cache: KVCache, name: str = IMPLEMENTATION) -> Callable[..., tuple[Tensor, None]]:
    """Make `name` an attention implementation that works on this cache; and that function."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        cache.calls += 1
        step = cache.context.step
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        window = _window(module, layer) if sliding_window is None else sliding_window
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        kind = _Kind(scale, window, softcap, s_aux)
        q, new = query[0], (key[0], value[0])
        pools = cache.pools(layer, *new)
        make = query.new_zeros if step.padded else query.new_empty
        out = make((query.shape[2], query.shape[1], value.shape[-1]))
        if step.paged is not None:
            _attend_blocks(out, q, *new, pools, step, kind)
        elif can_attend(q, *new):
            keys, values = (pool.tokens for pool in pools)
            where = (step.kv_index, step.row_spans)
            attend_rows(out, q, *new, keys, values, *where, scale, window, softcap, s_aux)
        else:
            _attend_spans(out, q, *new, pools, step, kind)
        return out[None], None

    AttentionInterface.register(name, attention)
    return attention


def _window(module: nn.Module, layer: int) -> int | None:
    """A layer's window where its class (qwen2_moe) leaves that to the mask that is not built."""
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None or kinds[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def _attend_blocks(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pools: tuple[Pool, Pool],
    step: Step,
    kind: _Kind,
) -> None:
    """query [Hq, T, D], key and value [Hkv, T, D]; out [T, Hq, D]."""
    assert step.paged is not None
    keys, values = (pool.blocks for pool in pools)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    store_paged(keys, values, key, value, step.kv_index)
    wanted = (kind.scale, kind.window, kind.softcap, kind.sinks)
    attend_paged(out, query, keys, values, step.paged, *wanted)


def _attend_spans(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pools: tuple[Pool, Pool],
    step: Step,
    kind: _Kind,
) -> None:
    """As `_attend_blocks`, over rows."""
    for pool, new in zip(pools, (key, value), strict=True):
        pool.tokens.index_copy_(1, step.kv_index, new)
    for span in step.spans:
        k, v = (pool.of_span(span) for pool in pools)
        mask = _mask(step, span, kind.window)
        out[span.start : span.end] = _attend_span(query[:, span.start : span.end], k, v, mask, kind)


def _attend_span(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kind: _Kind
) -> Tensor:
    """query [Hq, n, D], key and value [Hkv, S, D]; mask [n, S], None: causal -> [n, Hq, D]."""
    if kind.plain:
        out = F.scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=kind.scale,
            enable_gqa=True,
        )[0]
        return out.transpose(0, 1)
    heads, count, _ = query.shape
    groups = key.shape[0]
    if mask is None:
        mask = torch.ones(count, count, dtype=torch.bool, device=query.device).tril()
    q = (query * kind.scale).reshape(groups, -1, query.shape[-1])
    scores = torch.matmul(q, key.transpose(1, 2)).view(groups, heads // groups, count, -1)
    sink = None if kind.sinks is None else kind.sinks.view(groups, heads // groups, 1, 1)
    probabilities = _softmax(scores, ~mask, kind.softcap, sink).view(groups, -1, key.shape[1])
    return torch.matmul(probabilities, value).view(heads, count, -1).transpose(0, 1)


def _softmax(scores: Tensor, hidden: Tensor, softcap: float | None, sink: Tensor | None) -> Tensor:
    """Probabilities over the last dimension; a sink takes its share and is left out. What is hidden
    is filled, not added to: a hidden score may be NaN."""
    wide = scores.float()
    if softcap is not None:
        wide = softcap * torch.tanh(wide / softcap)
    wide.masked_fill_(hidden, -torch.inf)
    if sink is not None:
        wide = torch.cat([wide, sink.float().expand(*wide.shape[:-1], 1)], dim=-1)
        return wide.softmax(dim=-1)[..., :-1].to(scores.dtype)
    return wide.softmax(dim=-1).to(scores.dtype)


def _mask(step: Step, span: Span, window: int | None) -> Tensor | None:
    """[n, S], or None where plain causal attention says the same."""
    if span.past == 0 and (window is None or window >= span.length):
        return None
    key = (span.start, window)
    if key not in step.masks:
        device = step.input_ids.device
        row = torch.arange(span.past, span.length, device=device)[:, None]
        column = torch.arange(span.length, device=device)
        mask = column <= row
        if window is not None:
            mask = mask & (column > row - window)
        step.masks[key] = mask
    return step.masks[key]
