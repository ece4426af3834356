"""What an adapter changes at a model's two ends: the embedding, and the output head beside LoRA.

    LoRA of an embedding       y = gain * (y + scale * A[:, token] B^T)
    trainable tokens           some tokens have another row; where head and embedding are one
                               weight, another logit, too
    modules_to_save            another weight altogether
    added tokens               rows, of any of these, for token ids that the base does not have;
                               LoRA of the head is then here, too, as wide as they make it

Tensors come in the engine's dtype. Raises nothing. Does not cover: reading them (end_tensors.py);
LoRA of a head that has the base's rows, which is that of any linear layer.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

__all__ = ["Ends", "TokenRows", "VocabularyChange"]


@dataclass(frozen=True, eq=False)
class Ends:
    """The two ends of the base model, by module name: `weight` [vocabulary, hidden] of the
    embedding; `tied`: the head has the same."""

    embedding: str
    head: str | None
    tied: bool
    weight: Tensor
    head_has_bias: bool = False

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows [n, hidden] of the tokens `ids` int64 [n], which ascend."""

    ids: Tensor
    rows: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> TokenRows:
        return TokenRows(self.ids.to(device), self.rows.to(device, non_blocking=non_blocking))


@dataclass(frozen=True, eq=False)
class VocabularyChange:
    """a [vocabulary, rank] and b [rank, hidden] are LoRA's of the embedding, gain [hidden] DoRA's,
    less 1; `embedding` and `head` [vocabulary, hidden] stand in place of the base's, `tokens` and
    `head_tokens` in place of some rows of these. `size`: token ids that there are, where they are
    not as many as the base's; head_a [hidden, rank] and head_b [rank, size] are LoRA of the head
    then."""

    a: Tensor | None = None
    b: Tensor | None = None
    gain: Tensor | None = None
    tokens: TokenRows | None = None
    embedding: Tensor | None = None
    head: Tensor | None = None
    head_tokens: TokenRows | None = None
    head_a: Tensor | None = None
    head_b: Tensor | None = None
    size: int | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Each once."""
        found: dict[int, Tensor] = {}
        for part in self._parts().values():
            some = [part.ids, part.rows] if isinstance(part, TokenRows) else [part]
            found |= {id(tensor): tensor for tensor in some if isinstance(tensor, Tensor)}
        return list(found.values())

    def to(self, device: torch.device) -> VocabularyChange:
        """On a device; the same where it is there."""
        parts = self._parts()
        moved = {
            id(part): part.to(device, non_blocking=True)
            for part in parts.values()
            if isinstance(part, (Tensor, TokenRows))
        }
        return VocabularyChange(**{n: moved.get(id(part), part) for n, part in parts.items()})

    def _parts(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def embed(self, ids: Tensor, y: Tensor, scale: Tensor | float) -> Tensor:
        """ids [n], and what the base makes of them, y [n, hidden], which is `scale` times its
        weight's rows (of an id that it does not have, any row): what the adapter makes of them."""
        if self.embedding is not None:
            y = self.embedding[ids] * scale
        if self.tokens is not None:
            at = torch.searchsorted(self.tokens.ids, ids).clamp_(max=len(self.tokens.ids) - 1)
            own = (self.tokens.ids[at] == ids)[:, None]
            y = torch.where(own, self.tokens.rows[at] * scale, y)
        if self.gain is not None:
            y = y + y * self.gain
        if self.a is not None and self.b is not None:
            y = y + _by_row(self.a[ids], self.b) * scale
        return y

    def logits(self, h: Tensor, logits: Tensor) -> Tensor:
        """Of hidden states h [n, hidden] and the logits [n, width] of the base and of LoRA, which
        are wide enough for the adapter; what is beyond its tokens stays as it is."""
        if self.head is not None:
            logits = _over(logits, _by_row(h, self.head.t()))
        if self.head_tokens is not None:
            own = _by_row(h, self.head_tokens.rows.t())
            logits = logits.index_copy(1, self.head_tokens.ids, own)
        if self.head_a is not None and self.head_b is not None:
            lora = _by_row(_by_row(h, self.head_a), self.head_b)
            logits = _over(logits, logits[:, : lora.shape[1]] + lora)
        return logits


def _over(logits: Tensor, own: Tensor) -> Tensor:
    """The first columns replaced."""
    return torch.cat([own, logits[:, own.shape[1] :]], dim=1)


def _by_row(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, in] times weight [in, out]. On a CPU a row does not depend on the others, not even in
    rounding."""
    if x.device.type != "cpu" or len(x) < 2:
        return x @ weight
    return torch.stack([row[None] @ weight for row in x]).flatten(0, 1)
