"""A model of the Llama kind from token ids to logits, without transformers' wrappers.

Where all its layers are one call (decoder_layer.py), what transformers does around it takes as long
as one of them. The same modules are called here, in the order in which transformers' classes of
these names call them. `probe.py` compares the result with the untouched model before any job runs.
Raises nothing.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lorabatch_kernels import rms_norm
from lorabatch_worker.decoder_layer import CompiledLayers
from lorabatch_worker.step import Step

__all__ = ["DirectModel"]

CLASSES = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"})


class DirectModel:
    """A step's logits."""

    def __init__(self, model: Any, layers: CompiledLayers) -> None:
        inner = model.model
        self._embed, self._rotary, self._layers = inner.embed_tokens, inner.rotary_emb, layers
        self._norm = (inner.norm.weight, float(inner.norm.variance_epsilon))
        self._head = model.lm_head

    @classmethod
    def of(cls, model: Any) -> DirectModel | None:
        """None where it does not know the model, or not all layers are in one call."""
        if type(model).__name__ not in CLASSES:
            return None
        first, *others = model.model.layers
        if others or not isinstance(first, CompiledLayers):
            return None
        same = model.model.norm.weight.dtype == model.model.embed_tokens.weight.dtype
        return cls(model, first) if same else None

    def __call__(self, step: Step) -> Tensor:
        """Logits [n, vocabulary] of the n tokens that are sampled."""
        hidden = self._embed(step.input_ids[None])
        rotary = self._rotary(hidden, step.position_ids[None])
        hidden = self._layers(hidden, position_embeddings=rotary)
        if step.sample_map is not None:
            hidden = hidden[:, step.sample_index]
        logits: Tensor = self._head(rms_norm(hidden, *self._norm))
        return logits[0]
