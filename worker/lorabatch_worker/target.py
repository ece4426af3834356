"""What adapters must fit here: the base model as the readers of adapters see it.

Raises what loading the base model raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorabatch.settings import Settings
from lorabatch_worker.adapters.affine import BaseLayer
from lorabatch_worker.adapters.base_tokenizer import BaseTokenizer
from lorabatch_worker.adapters.tokenizer import TOKENS
from lorabatch_worker.adapters.vocabulary import Ends
from lorabatch_worker.adapters.weights import AdapterTarget
from lorabatch_worker.base_model import BaseModel, load_base_model
from lorabatch_worker.ends import ends_of, is_tied
from lorabatch_worker.linear import BLOCK
from lorabatch_worker.lora_layers import linear_shapes, weight_of

__all__ = ["Shape", "load_target", "target_of"]


@dataclass(frozen=True)
class Shape:
    """Of a model that has its own layers still: (in, out) of its linear layers, all its modules."""

    linears: Mapping[str, tuple[int, int]]
    modules: frozenset[str]

    @classmethod
    def of(cls, model: Any) -> Shape:
        return cls(linear_shapes(model), frozenset(name for name, _ in model.named_modules()))


def target_of(
    settings: Settings,
    base: BaseModel,
    shape: Shape,
    layer: Callable[[str], BaseLayer],
    ends: Ends | None,
) -> AdapterTarget:
    return AdapterTarget(
        base_names=frozenset({base.name.partition("@")[0], *settings.base_model_aliases}),
        shapes=shape.linears,
        modules=shape.modules,
        max_rank=settings.max_adapter_rank,
        dtype=base.dtype,
        layer=layer,
        ends=ends,
        tokenizer=BaseTokenizer(lambda: _tokenizer(base.folder), base.folder / TOKENS),
        pinned=base.device.type == "cuda",
        max_context_tokens=base.max_context_tokens,
        positions=base.positions,
    )


def load_target(settings: Settings) -> AdapterTarget:
    """Of the base model alone, without an engine. Takes seconds."""
    base = load_base_model(settings)
    model = base.model

    def layer(name: str) -> BaseLayer:
        return _Linear(model.get_submodule(name))

    return target_of(settings, base, Shape.of(model), layer, ends_of(model, is_tied(model)))


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


class _Linear:
    """A layer of an untouched model."""

    def __init__(self, module: Any) -> None:
        self._weight = weight_of(module)
        self.bias: Tensor | None = module.bias
        self.out_features = self._weight.shape[0]

    def weight_blocks(self) -> Iterator[Tensor]:
        yield from torch.split(self._weight, BLOCK)
