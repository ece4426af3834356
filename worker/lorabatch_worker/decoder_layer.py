"""Decoder layers of the Llama kind on a CPU, in few calls.

Norms, rotary embedding and gated MLP are many small operators in transformers, and their calls take
as long as the work in a small batch (docs/decisions/0008). For the classes named in
`WINDOWS` the same sums are made here by the C kernels, over the projections as they come out of
one product. Every other class, and a machine without compiled kernels, keeps transformers' own
layers. `probe.py` compares the result with the untouched model before any job runs. Raises nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorabatch_kernels import native, rms_norm, rotary_, silu_gate
from lorabatch_worker.lora_layers import LoraGroup, LoraLinear

__all__ = ["fuse_layers"]

# The layer classes whose sums are the ones below, and where their attention's window is.
WINDOWS: dict[str, Callable[[Any], int | None]] = {
    "LlamaDecoderLayer": lambda attention: None,
    "MistralDecoderLayer": lambda attention: attention.config.sliding_window,
    "Qwen2DecoderLayer": lambda attention: attention.sliding_window,
}


def fuse_layers(model: Any, attend: Callable[..., tuple[Tensor, None]]) -> int:
    """Give the layers that it knows another `forward`: how many. `attend` is the attention."""
    fused = 0
    for layer in model.modules():
        if type(layer).__name__ in WINDOWS and _fits(layer):
            layer.forward = FusedLayer(layer, attend)
            fused += 1
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
        and q.site.a.device.type == "cpu"
        and all(norm.dtype == q.site.dtype for norm in norms)
        and native.supports(q.site.dtype)
        and native.library() is not None
        and attention.config.hidden_act in ("silu", "swish")
    )


class FusedLayer:
    """h += o(attention(rotated q, k, v of norm(h))); h += down(silu(gate) * up of norm(h))."""

    def __init__(self, layer: Any, attend: Callable[..., tuple[Tensor, None]]) -> None:
        self.attention, self.attend = layer.self_attn, attend
        self.window = WINDOWS[type(layer).__name__](self.attention)
        self.scaling: float = self.attention.scaling
        self.norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self.qkv: LoraGroup = self.attention.q_proj.group
        self.o: LoraGroup = self.attention.o_proj.group
        self.gate_up: LoraGroup = layer.mlp.gate_proj.group
        self.down: LoraGroup = layer.mlp.down_proj.group

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states [1, T, hidden] -> the same; position_embeddings: cos and sin [1, T, D].

        What else transformers passes (mask, cache, positions) is the step's, which `attend` reads.
        """
        assert position_embeddings is not None
        cos, sin = (part[0] for part in position_embeddings)
        h = hidden_states
        first, second = self.norms
        qkv = self.qkv.whole(rms_norm(h, first.weight, first.variance_epsilon))
        q, k, v = torch.split_with_sizes(qkv[0], self.qkv.product.widths, dim=-1)
        width = cos.shape[-1]
        rotary_(qkv[0, :, : q.shape[1] + k.shape[1]], cos, sin)
        heads = (part.view(1, part.shape[0], -1, width).transpose(1, 2) for part in (q, k, v))
        attended, _ = self.attend(
            self.attention, *heads, None, scaling=self.scaling, sliding_window=self.window
        )
        h = self.o.whole(attended.flatten(2)).add_(h)
        gated = silu_gate(self.gate_up.whole(rms_norm(h, second.weight, second.variance_epsilon)))
        return self.down.whole(gated).add_(h)
