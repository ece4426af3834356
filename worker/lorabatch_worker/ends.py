"""The model's two ends, embedding and output head, as the adapters in the slots change them.

LoRA of the head is that of any linear layer; what is here are other weights, trained tokens, LoRA
of the embedding and added tokens, for the tokens of each slot in turn: adapters that have them are
few. Steps with such a sequence are not repeated from CUDA graphs. The logits of a step are as wide
as the widest vocabulary in it, with -infinity beyond a row's own. Used from the engine's thread
alone. Raises nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorabatch_worker.adapters.vocabulary import Ends, VocabularyChange
from lorabatch_worker.step import Step, StepContext

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
        self._rows = 0
        if isinstance(embedding, nn.Embedding):
            self._rows = embedding.num_embeddings
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

    def enter(self, step: Step) -> Step:
        """The step, with no token id that the base's embedding has no row for: an added token, in
        the place of which there is any other until `_embed`."""
        if self._widest(step, step.tokens) <= self._rows:
            return step
        ids = step.input_ids
        return replace(step, input_ids=ids.clamp(max=self._rows - 1), adapter_ids=ids)

    def leave(self, step: Step, logits: Tensor, vocabulary: int) -> Tensor:
        """`logits` [n, width] of the sampled tokens, -infinity beyond each row's own vocabulary.
        Here and not in `_logits`, because a model may bend its logits after the head, as tanh."""
        if not self._widest(step, len(logits)):
            return logits
        own = [vocabulary] * len(logits)
        for slot, tokens in step.map_of(len(logits)).groups.items():
            for token in tokens:
                own[token] = self._size(slot) or vocabulary
        limits = torch.tensor(own, device=logits.device)
        columns = torch.arange(logits.shape[1], device=logits.device)
        return logits.masked_fill(columns >= limits[:, None], -torch.inf)

    def _size(self, slot: int) -> int:
        """Tokens of the adapter in this slot, 0 if they are the base's."""
        change = self._by_slot.get(slot)
        return 0 if change is None else change.size or 0

    def _widest(self, step: Step, tokens: int) -> int:
        """Of all tokens of the step, or of the sampled ones, whichever there are so many of."""
        return max((self._size(slot) for slot in step.map_of(tokens).groups), default=0)

    def _embed(self, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self._by_slot:
            return output
        scale = getattr(module, "embed_scale", 1.0)
        if isinstance(scale, Tensor):
            scale = scale.to(output.dtype)
        ids = self._context.step.adapter_ids
        given = args[0] if ids is None else ids[None]
        return self._changed(given, output, lambda one, ids, y: one.embed(ids, y, scale))

    def _logits(self, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self._by_slot:
            return output
        wider = self._widest(self._context.step, output.shape[1]) - output.shape[2]
        if wider > 0:
            output = nn.functional.pad(output, (0, wider))
        return self._changed(args[0], output, lambda one, h, y: one.logits(h, y))

    def _changed(self, given: Tensor, made: Tensor, change: Any) -> Tensor:
        """`made` [1, n, ...] of `given` [1, n] or [1, n, hidden], in place."""
        for slot, tokens in self._context.step.map_of(made.shape[1]).groups.items():
            if slot in self._by_slot:
                at = torch.tensor(tokens, device=made.device)
                made[0, at] = change(self._by_slot[slot], given[0, at], made[0, at])
        return made
