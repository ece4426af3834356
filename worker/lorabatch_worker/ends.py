"""The model's two ends, embedding and output head, as the adapters in the slots change them.

LoRA of the head is that of any linear layer; what is here are other weights, trained tokens and
LoRA of the embedding, for the tokens of each slot in turn: adapters that have them are few. Steps
with such a sequence are not repeated from CUDA graphs. Used from the engine's thread alone.
Raises nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorabatch_worker.adapters.vocabulary import Ends, VocabularyChange
from lorabatch_worker.step import StepContext

__all__ = ["ChangedEnds", "ends_of", "is_tied"]


def is_tied(model: Any) -> bool:
    """Whether head and embedding are one weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is not None and head.weight is embedding.weight


def ends_of(model: Any, tied: bool) -> Ends | None:
    """By the names that the model itself gives; None where it has no plain embedding."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding):
        return None
    biased = getattr(head, "bias", None) is not None
    weight = embedding.weight.detach()
    return Ends(names[id(embedding)], names.get(id(head)), tied, weight, biased)


class ChangedEnds:
    """What the adapter in each slot changes there."""

    def __init__(self, model: Any, context: StepContext, device: torch.device) -> None:
        self._context, self._device = context, device
        self._by_slot: dict[int, VocabularyChange] = {}
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if isinstance(embedding, nn.Embedding):
            embedding.register_forward_hook(self._embed)
        if head is not None:
            head.register_forward_hook(self._logits)

    def load(self, slot: int, change: VocabularyChange | None) -> None:
        """For the adapter that is now in this slot."""
        self._by_slot.pop(slot, None)
        if change is not None:
            self._by_slot[slot] = change.to(self._device)

    def drop(self, slot: int) -> None:
        """Nobody is in this slot any more."""
        self._by_slot.pop(slot, None)

    def changes(self, slot: int) -> bool:
        return slot in self._by_slot

    def _embed(self, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        scale = getattr(module, "embed_scale", 1.0)
        if isinstance(scale, Tensor):
            scale = scale.to(output.dtype)
        return self._changed(args[0], output, lambda one, ids, y: one.embed(ids, y, scale))

    def _logits(self, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self._changed(args[0], output, lambda one, h, y: one.logits(h, y))

    def _changed(self, given: Tensor, made: Tensor, change: Any) -> Tensor:
        """`made` [1, n, ...] of `given` [1, n] or [1, n, hidden], in place."""
        if self._by_slot:
            for slot, tokens in self._context.step.map_of(made.shape[1]).groups.items():
                if slot in self._by_slot:
                    at = torch.tensor(tokens, device=made.device)
                    made[0, at] = change(self._by_slot[slot], given[0, at], made[0, at])
        return made
