"""Decoder layers of the Llama kind over a step's tokens, in one call of C (native/layer.c).

    h += o(attention(rotated q, k, v of norm(h)));  h += down(silu(gate) * up of norm(h))

layer after layer, each product with its adapters' terms. Norms, rotary embedding, gate, attention
and LoRA are those of rows_cpu.py, attention_cpu.py and lora_cpu.py; q, k and v share one product,
gate and up another. Shapes and dtypes: h [tokens, hidden], changed in place, contiguous, fp32 or
bf16 like all else.

Raises nothing: callers pass what the modules named above can take. Does not cover: gradients,
biases of norms, layers of any other order.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof

from torch import Tensor

from lorabatch_kernels import native
from lorabatch_kernels.attention_cpu import RowSpans
from lorabatch_kernels.group import SiteGroup
from lorabatch_kernels.matmul_cpu import PackedWeight
from lorabatch_kernels.step_map import StepMap

__all__ = ["DecoderLayer", "DecoderLayers", "LayerStep"]

Product = tuple[PackedWeight, SiteGroup]


class DecoderLayer:
    """A layer's weights, adapters and cache rows as the kernel reads them: addresses stay."""

    def __init__(
        self,
        products: Sequence[Product],
        norms: Sequence[tuple[Tensor, float]],
        pools: tuple[Tensor, Tensor],
        heads: int,
        scale: float,
        window: int | None,
    ) -> None:
        """`products`: qkv, o, gate and up, down; `norms`: weight [hidden] and epsilon of both;
        `pools`: keys and values [Hkv, positions, width]."""
        self.products = products
        self._held = (norms, pools)
        (first, first_epsilon), (second, second_epsilon) = norms
        kv_heads, positions, width = pools[0].shape
        self.dtype = first.dtype
        self.struct = native.Decoder(
            *(native.Product(w.struct, addressof(s.structs), len(s.sites)) for w, s in products),
            *(t.data_ptr() for t in (first, second, *pools)),
            *(heads, kv_heads, width, positions, window or 0),
            *(scale, first_epsilon, second_epsilon),
        )


class DecoderLayers:
    """A model's layers, in order. All have the same sizes."""

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        self.layers = layers
        self._half = native.is_half(layers[0].dtype)
        self._structs = (native.Decoder * len(layers))(*(layer.struct for layer in layers))

    @property
    def products(self) -> Sequence[Product]:
        """Of one layer."""
        return self.layers[0].products

    def __call__(self, h: Tensor, step: LayerStep) -> None:
        """Where the step keeps some tokens only, the others' hidden states are left unfinished."""
        library = native.library()
        assert library is not None
        where = (h.data_ptr(), addressof(self._structs), len(self.layers))
        library.lorabatch_decoder_layers(*where, addressof(step.struct), self._half)


class LayerStep:
    """What the layers of one step share: its tokens' places, and room to work in."""

    def __init__(
        self,
        products: Sequence[Product],
        cos: Tensor,
        sin: Tensor,
        index: Tensor,
        spans: RowSpans,
        step_map: StepMap,
        kept: tuple[Tensor, StepMap] | None = None,
        seconds: Tensor | None = None,
    ) -> None:
        """cos, sin [tokens, width]; index int64 [tokens]: places in the pools. `products` are those
        of any layer: all have the same sizes. kept: int64 [n], the tokens whose hidden states are
        needed in the end, and the step map of these n; None: all. seconds: float64 [4], to which
        the time of products, LoRA, attention and the rest is added."""
        tokens = cos.shape[0]
        qkv, o, gate_up, down = (weight for weight, _ in products)
        widths = [qkv.in_features, qkv.out_features, o.in_features]
        widths += [gate_up.out_features, down.in_features, down.out_features]
        self._room = [cos.new_empty(tokens, width) for width in widths]
        self._held = (cos, sin, index, spans, step_map, kept, seconds)
        where, kept_map = kept or (None, None)
        count = -1 if where is None else where.shape[0]
        self._room.append(cos.new_empty(max(count, 0), widths[0]))
        self.struct = native.Step(
            *(t.data_ptr() for t in (*self._room[:-1], cos, sin, index)),
            addressof(spans.struct),
            _tiles(step_map),
            None if seconds is None else seconds.data_ptr(),
            None if where is None else where.data_ptr(),
            self._room[-1].data_ptr(),
            _tiles(kept_map),
            tokens,
            count,
        )


def _tiles(step_map: StepMap | None) -> int | None:
    return addressof(step_map.tiles.struct) if step_map and step_map.active else None
