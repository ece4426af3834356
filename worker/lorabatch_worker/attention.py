"""Attention over a paged KV cache, for every model that dispatches through transformers'
attention interface.

One function serves decode tokens and prefill chunks of the same flat batch: it writes the new
keys and values into the layer's pool, then decode tokens attend as one padded batch and each
prefill chunk by itself. Pools are [Hkv, blocks, block_size, D], so that a sequence's blocks
gather into one contiguous run. Softmax in float32. Handles grouped queries, sliding windows,
logit softcap and sinks; not covered: ALiBi and other additive biases, cross attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from lorabatch_kernels.site import lazy_zeros
from lorabatch_worker.step import PrefillSpan, Step, StepContext

__all__ = ["IMPLEMENTATION", "KVCache", "register"]

IMPLEMENTATION = "lorabatch_paged"


class KVCache:
    """Keys and values of every layer: `keys[layer]` [Hkv, blocks, block_size, D].

    Made on first use, when a layer's head count and width are seen, so that models whose layers
    differ need no special case.
    """

    def __init__(self, num_blocks: int, block_size: int, context: StepContext) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.context = context
        self.calls = 0
        self._pools: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, key: Tensor, value: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Store the step's key and value [Hkv, T, D]: the layer's pools."""
        if layer not in self._pools:
            self._pools[layer] = (self._pool(key), self._pool(value))
        # Decode reads whole blocks. What is past a sequence's end has weight 0, but 0 * NaN is NaN:
        # values that a broken adapter's job left behind must not reach the block's next owner.
        self._pools[layer][1].index_fill_(1, step.fresh_blocks, 0.0)
        for pool, new in zip(self._pools[layer], (key, value), strict=True):
            pool.view(pool.shape[0], -1, pool.shape[-1]).index_copy_(1, step.kv_index, new)
        return self._pools[layer]

    def _pool(self, like: Tensor) -> Tensor:
        heads, _, width = like.shape
        shape = (heads, self.num_blocks, self.block_size, width)
        return lazy_zeros(shape, like.dtype, like.device)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for pair in self._pools.values() for t in pair)


def register(cache: KVCache, name: str = IMPLEMENTATION) -> None:
    """Make `name` an attention implementation that works on this cache."""

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
        keys, values = cache.write(layer, key[0], value[0], step)
        out = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
        if step.decodes:
            q = query[0, :, : step.decodes] * scale
            mask = _decode_mask(step, cache.block_size, window)
            out[: step.decodes] = _decode(q, keys, values, step, mask, softcap, s_aux)
        for span in step.prefill:
            q = query[0, :, span.start : span.end]
            causal = _prefill_mask(step, span, window)
            k, v = (_gather(pool, span.blocks, span.length) for pool in (keys, values))
            out[span.start : span.end] = _prefill(q, k, v, causal, scale, softcap, s_aux)
        return out[None], None

    AttentionInterface.register(name, attention)


def _window(module: nn.Module, layer: int) -> int | None:
    """A layer's window where its class (qwen2_moe) leaves that to the mask that is not built."""
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None or kinds[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def _gather(pool: Tensor, blocks: Tensor, length: int) -> Tensor:
    """Blocks of one sequence as [Hkv, length, D]."""
    return pool.index_select(1, blocks).flatten(1, 2)[:, :length]


def _decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    step: Step,
    mask: Tensor,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """query [Hq, B, D], scaled; mask [B, 1, S] -> [B, Hq, D]."""
    heads, batch, width = query.shape
    groups = keys.shape[0]
    blocks = step.decode_blocks.flatten()
    k = keys.index_select(1, blocks).view(groups, batch, -1, width)
    v = values.index_select(1, blocks).view(groups, batch, k.shape[2], -1)
    q = query.view(groups, heads // groups, batch, width).transpose(1, 2)
    scores = torch.matmul(q, k.transpose(2, 3))
    sink = None if sinks is None else sinks.view(groups, 1, heads // groups, 1)
    probabilities = _softmax(scores, mask, softcap, sink)
    return torch.matmul(probabilities, v).permute(1, 0, 2, 3).reshape(batch, heads, -1)


def _prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """query [Hq, n, D], key and value [Hkv, S, D]; mask [n, S], None: causal -> [n, Hq, D]."""
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=True,
        )[0]
        return out.transpose(0, 1)
    heads, count, _ = query.shape
    groups = key.shape[0]
    if mask is None:
        mask = torch.ones(count, count, dtype=torch.bool, device=query.device).tril()
    q = (query * scale).reshape(groups, -1, query.shape[-1])
    scores = torch.matmul(q, key.transpose(1, 2)).view(groups, heads // groups, count, -1)
    sink = None if sinks is None else sinks.view(groups, heads // groups, 1, 1)
    probabilities = _softmax(scores, mask, softcap, sink).view(groups, -1, key.shape[1])
    return torch.matmul(probabilities, value).view(heads, count, -1).transpose(0, 1)


def _softmax(scores: Tensor, mask: Tensor, softcap: float | None, sink: Tensor | None) -> Tensor:
    """Probabilities over the last dimension; a sink takes its share and is left out."""
    wide = scores.float()
    if softcap is not None:
        wide = softcap * torch.tanh(wide / softcap)
    wide = wide.masked_fill(~mask, -torch.inf)
    if sink is not None:
        wide = torch.cat([wide, sink.float().expand(*wide.shape[:-1], 1)], dim=-1)
        return wide.softmax(dim=-1)[..., :-1].to(scores.dtype)
    return wide.softmax(dim=-1).to(scores.dtype)


def _decode_mask(step: Step, block_size: int, window: int | None) -> Tensor:
    """[B, 1, S]: which of a row's gathered positions are its own and inside the window."""
    key = ("decode", window)
    if key not in step.masks:
        length = step.decode_lengths[:, None]
        position = torch.arange(step.decode_blocks.shape[1] * block_size, device=length.device)
        mask = position < length
        if window is not None:
            mask = mask & (position >= length - window)
        step.masks[key] = mask[:, None]
    return step.masks[key]


def _prefill_mask(step: Step, span: PrefillSpan, window: int | None) -> Tensor | None:
    """[n, S], or None where plain causal attention says the same."""
    if span.past == 0 and (window is None or window >= span.length):
        return None
    key = (f"prefill {span.start}", window)
    if key not in step.masks:
        device = step.input_ids.device
        row = torch.arange(span.past, span.length, device=device)[:, None]
        column = torch.arange(span.length, device=device)
        mask = column <= row
        if window is not None:
            mask = mask & (column > row - window)
        step.masks[key] = mask
    return step.masks[key]
