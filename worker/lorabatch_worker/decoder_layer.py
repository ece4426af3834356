"""Decoder layers of the Llama kind, in few calls.

In a small batch the many operators of a layer in transformers take longer to call than to compute
(docs/decisions/0008, 0009). For the classes named in `WINDOWS` the same sums are made by our
kernels: on a CPU all layers in one call; on a GPU, and where a CPU's products are not ours, each in
a dozen. Every other class, and a CPU without compiled kernels, keeps transformers' own layers.
`probe.py` compares the result with the untouched model before any job runs. Raises nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, ModuleList

from lorabatch_kernels import (
    DecoderLayer,
    DecoderLayers,
    LayerStep,
    PackedWeight,
    SiteGroup,
    can_add_lora,
    can_attend,
    can_do_rows,
    rms_norm,
)
from lorabatch_worker.kv_cache import KVCache
from lorabatch_worker.lora_layers import LoraGroup, LoraLinear

__all__ = ["FusedLayers", "fuse_layers"]

# The layer classes whose sums are the ones below, and where their attention's window is.
WINDOWS: dict[str, Callable[[Any], int | None]] = {
    "LlamaDecoderLayer": lambda attention: None,
    "MistralDecoderLayer": lambda attention: attention.config.sliding_window,
    "Qwen2DecoderLayer": lambda attention: attention.sliding_window,
}

Attend = Callable[..., tuple[Tensor, None]]


class FusedLayers:
    """How many layers have another `forward`, and how many of these are in one call."""

    def __init__(self) -> None:
        self.count = 0
        self.compiled = 0
        self.seconds: Tensor | None = None
        """float64 [4], where given: of the layers in one call, products, LoRA, attention and the
        rest are added up in it."""


def fuse_layers(model: Any, cache: KVCache, attend: Attend) -> FusedLayers:
    """Give the layers that it knows another `forward`. `attend` is the attention over the cache."""
    fused = FusedLayers()
    for holder in list(model.modules()):
        for name, layers in holder.named_children():
            if not isinstance(layers, ModuleList) or not any(map(_known, layers)):
                continue
            parts = [_Parts(layer) if _known(layer) else None for layer in layers]
            known = [part for part in parts if part is not None]
            fused.count += len(known)
            if cache.row_blocks and len(known) == len(parts) and _can_compile(known):
                fused.compiled += len(known)
                setattr(holder, name, ModuleList([CompiledLayers(layers, known, cache, fused)]))
                continue
            for layer, part in zip(layers, parts, strict=True):
                if part is not None:
                    layer.forward = FusedLayer(part, attend)
    return fused


def _known(layer: Any) -> bool:
    return type(layer).__name__ in WINDOWS and _fits(layer)


def _can_compile(parts: list[_Parts]) -> bool:
    return all(part.can_compile() for part in parts) and len({part.sizes for part in parts}) == 1


def _fits(layer: Any) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    names = ((attention, "q_proj k_proj v_proj o_proj"), (mlp, "gate_proj up_proj down_proj"))
    linears: list[Any] = [
        getattr(part, name, None) for part, several in names for name in several.split()
    ]
    if not all(isinstance(linear, LoraLinear) for linear in linears):
        return False
    q, k, v, _, gate, up, _ = linears
    norms = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
    return (
        q.group is k.group is v.group
        and gate.group is up.group
        and all(norm.dtype == q.site.dtype for norm in norms)
        and can_do_rows(q.site.device, q.site.dtype)
        and attention.config.hidden_act in ("silu", "swish")
    )


class _Parts:
    """A layer's own."""

    def __init__(self, layer: Any) -> None:
        self.attention = layer.self_attn
        self.window = WINDOWS[type(layer).__name__](self.attention)
        self.scaling: float = self.attention.scaling
        self.norms = [
            (norm.weight, float(norm.variance_epsilon))
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        self.qkv: LoraGroup = self.attention.q_proj.group
        self.o: LoraGroup = self.attention.o_proj.group
        self.gate_up: LoraGroup = layer.mlp.gate_proj.group
        self.down: LoraGroup = layer.mlp.down_proj.group

    @property
    def groups(self) -> tuple[LoraGroup, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def products(self) -> list[tuple[PackedWeight, SiteGroup]]:
        packed = [(group.product.dense.product, group.sites) for group in self.groups]
        return [(made, sites) for made, sites in packed if isinstance(made, PackedWeight)]

    @property
    def sizes(self) -> tuple[int, ...]:
        products = (group.product for group in self.groups)
        return sum(((p.dense.in_features, *p.widths) for p in products), (self.width,))

    @property
    def width(self) -> int:
        """Of a head."""
        return int(self.attention.head_dim)

    def sample(self) -> tuple[Tensor, Tensor]:
        """A query and a key of no tokens: [heads, 0, width]."""
        weight = self.norms[0][0]
        heads, kv_heads, _ = (out // self.width for out in self.qkv.product.widths)
        return weight.new_empty(heads, 0, self.width), weight.new_empty(kv_heads, 0, self.width)

    def can_compile(self) -> bool:
        query, key = self.sample()
        return can_attend(query, key, key) and all(
            isinstance(group.product.dense.product, PackedWeight) and can_add_lora(group.sites)
            for group in self.groups
        )


class CompiledLayers(Module):
    """A model's layers in one call, in the place of the first; the hidden states are changed in
    place. Those of tokens that are not sampled are left unfinished: nobody reads them."""

    def __init__(
        self, layers: ModuleList, parts: list[_Parts], cache: KVCache, fused: FusedLayers
    ) -> None:
        super().__init__()
        self.layers, self._cache, self._fused = layers, cache, fused
        self._made = DecoderLayers([self._layer(part) for part in parts])

    def _layer(self, parts: _Parts) -> DecoderLayer:
        query, key = parts.sample()
        keys, values = self._cache.pools(int(parts.attention.layer_idx), key, key)
        pools, heads = (keys.tokens, values.tokens), query.shape[0]
        return DecoderLayer(parts.products, parts.norms, pools, heads, parts.scaling, parts.window)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states [1, T, hidden] -> the same; position_embeddings: cos and sin [1, T, D].

        What else transformers passes (mask, cache, positions) is the step's.
        """
        assert position_embeddings is not None
        step = self._cache.context.step
        cos, sin = (part[0].contiguous() for part in position_embeddings)
        kept = None if step.sample_map is None else (step.sample_index, step.sample_map)
        where = (step.kv_index, step.row_spans, step.step_map)
        h = hidden_states.contiguous()
        seconds = self._fused.seconds
        self._made(h, LayerStep(self._made.products, cos, sin, *where, kept, seconds))
        self._cache.calls += len(self.layers)
        return h


class FusedLayer:
    """The layer in a dozen calls."""

    def __init__(self, parts: _Parts, attend: Attend) -> None:
        self.parts, self.attend = parts, attend

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As CompiledLayers', the hidden states changed in place."""
        assert position_embeddings is not None
        cos, sin = (part[0] for part in position_embeddings)
        h, parts = hidden_states, self.parts
        first, second = parts.norms
        qkv = parts.qkv.rotated(rms_norm(h, *first), cos, sin)[0]
        heads = (
            part.view(1, part.shape[0], -1, cos.shape[-1]).transpose(1, 2)
            for part in torch.split_with_sizes(qkv, parts.qkv.product.widths, dim=-1)
        )
        attended, _ = self.attend(
            parts.attention, *heads, None, scaling=parts.scaling, sliding_window=parts.window
        )
        parts.o.add_to(h, attended.flatten(2))
        parts.down.add_to(h, parts.gate_up.gated(rms_norm(h, *second)))
        return h
