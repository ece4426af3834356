"""Decoder layers of the Llama kind, in few calls.

In a small batch the many operators of a layer in transformers take longer to call than to compute
(docs/decisions/0008, 0009). For the classes named in `WINDOWS` the same sums are made by our
kernels: on a CPU a whole layer in one call; on a GPU, and where a CPU's products are not ours, in a
dozen. Every other class, and a CPU without compiled kernels, keeps transformers' own layers.
`probe.py` compares the result with the untouched model before any job runs. Raises nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorabatch_kernels import (
    DecoderLayer,
    LayerStep,
    PackedWeight,
    SiteGroup,
    can_add_lora,
    can_attend,
    can_do_rows,
    rms_norm,
    rotary_,
    silu_gate,
)
from lorabatch_worker.kv_cache import KVCache
from lorabatch_worker.lora_layers import LoraGroup, LoraLinear
from lorabatch_worker.step import Step

__all__ = ["FusedLayers", "fuse_layers"]

# The layer classes whose sums are the ones below, and where their attention's window is.
WINDOWS: dict[str, Callable[[Any], int | None]] = {
    "LlamaDecoderLayer": lambda attention: None,
    "MistralDecoderLayer": lambda attention: attention.config.sliding_window,
    "Qwen2DecoderLayer": lambda attention: attention.sliding_window,
}

Attend = Callable[..., tuple[Tensor, None]]


class FusedLayers:
    """The layers that have another `forward`, and what those in one call share in a step."""

    def __init__(self) -> None:
        self.count = 0
        self.compiled = 0
        self.seconds: Tensor | None = None
        """float64 [4], where given: products, LoRA, attention and the rest are added up in it."""
        self._of: Step | None = None
        self._step: LayerStep | None = None

    def step(self, step: Step, parts: _Parts, turns: tuple[Tensor, Tensor]) -> LayerStep:
        """Made at the step's first layer. `turns`: cos and sin [1, T, D]."""
        if self._of is not step or self._step is None:
            cos, sin = (part[0].contiguous() for part in turns)
            where = (step.kv_index, step.row_spans, step.step_map)
            kept = None if step.sample_map is None else (step.sample_index, step.sample_map)
            self._step = LayerStep(parts.products, cos, sin, *where, kept, self.seconds)
            self._of = step
        return self._step


def fuse_layers(model: Any, cache: KVCache, attend: Attend) -> FusedLayers:
    """Give the layers that it knows another `forward`. `attend` is the attention over the cache."""
    fused = FusedLayers()
    for layer in model.modules():
        if type(layer).__name__ not in WINDOWS or not _fits(layer):
            continue
        parts = _Parts(layer)
        if cache.row_blocks and parts.can_compile():
            layer.forward = CompiledLayer(parts, cache, fused)
            fused.compiled += 1
        else:
            layer.forward = FusedLayer(parts, attend)
        fused.count += 1
    return fused


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
        and can_do_rows(q.site.a.device, q.site.dtype)
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

    def sample(self) -> tuple[Tensor, Tensor]:
        """A query and a key of no tokens: [heads, 0, width]."""
        width = int(self.attention.head_dim)
        weight = self.norms[0][0]
        counts = [out // width for out in self.qkv.product.widths]
        return weight.new_empty(counts[0], 0, width), weight.new_empty(counts[1], 0, width)

    def can_compile(self) -> bool:
        query, key = self.sample()
        return can_attend(query, key, key) and all(
            isinstance(group.product.dense.product, PackedWeight) and can_add_lora(group.sites)
            for group in self.groups
        )


class CompiledLayer:
    """The layer in one call; the hidden states are changed in place. The model's last one leaves
    those of tokens that are not sampled unfinished: nobody reads them."""

    def __init__(self, parts: _Parts, cache: KVCache, fused: FusedLayers) -> None:
        self.parts, self.cache, self.fused = parts, cache, fused
        query, key = parts.sample()
        number = int(parts.attention.layer_idx)
        pools = cache.pools(number, key, key)
        self.layer = DecoderLayer(
            parts.products,
            parts.norms,
            (pools[0].tokens, pools[1].tokens),
            query.shape[0],
            parts.scaling,
            parts.window,
            last=number == parts.attention.config.num_hidden_layers - 1,
        )

    def __call__(
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
        h = hidden_states.contiguous()
        self.layer(h, self.fused.step(self.cache.context.step, self.parts, position_embeddings))
        self.cache.calls += 1
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
        """As CompiledLayer's."""
        assert position_embeddings is not None
        cos, sin = (part[0] for part in position_embeddings)
        h, parts = hidden_states, self.parts
        first, second = parts.norms
        qkv = parts.qkv.whole(rms_norm(h, *first))
        q, k, v = torch.split_with_sizes(qkv[0], parts.qkv.product.widths, dim=-1)
        width = cos.shape[-1]
        rotary_(qkv[0, :, : q.shape[1] + k.shape[1]], cos, sin)
        heads = (part.view(1, part.shape[0], -1, width).transpose(1, 2) for part in (q, k, v))
        attended, _ = self.attend(
            parts.attention, *heads, None, scaling=parts.scaling, sliding_window=parts.window
        )
        h = parts.o.whole(attended.flatten(2)).add_(h)
        gated = silu_gate(parts.gate_up.whole(rms_norm(h, *second)))
        return parts.down.whole(gated).add_(h)
