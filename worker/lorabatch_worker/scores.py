"""Log probabilities of tokens, for rows that want them.

They are the model's own, as vLLM's are by default: before biases, penalties, temperature and all
that leaves tokens out, in float32. Nothing here waits for a GPU. What is impossible is LEAST, as
JSON knows no infinity. Shapes: logits [rows, vocabulary]. Raises nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as List

import torch
from torch import Tensor

from lorabatch_worker.packing import Packed
from lorabatch_worker.sequence import Scored, Sequence

__all__ = ["LEAST", "Scores"]

LEAST = -9999.0


class Scores:
    """Of one step's rows. Made before their logits are changed."""

    def __init__(self, logits: Tensor, sequences: List[Sequence], widths: List[int]) -> None:
        """`widths`: how many tokens there are for each row."""
        self._tops = {
            row: s.params.top_logprobs for row, s in enumerate(sequences) if s.params.scored
        }
        packed = Packed()
        packed.add(self._tops, torch.int64)
        packed.add([widths[row] for row in self._tops], torch.int64)
        self._rows, ends = packed.views(packed.send(logits.device))
        raw = logits[self._rows].float()
        vocabulary = logits.shape[-1]
        if any(widths[row] < vocabulary for row in self._tops):
            columns = torch.arange(vocabulary, device=logits.device)
            raw.masked_fill_(columns >= ends[:, None], -torch.inf)
        self._logprobs = raw.log_softmax(dim=-1).clamp_(min=LEAST)

    def of(self, tokens: Tensor) -> Tensor:
        """For each row of these that has scores: of its token [1], and of the k most likely ones,
        ids [k] and values [k], side by side."""
        drawn = tokens[self._rows].clamp(min=0)[:, None]
        own = self._logprobs.gather(-1, drawn).double()
        most = min(max(self._tops.values()), self._logprobs.shape[-1])
        if most == 0:
            return own
        values, ids = self._logprobs.topk(most, dim=-1)
        return torch.cat([own, ids.double(), values.double()], dim=-1)

    def read(self, found: Tensor) -> dict[int, Scored]:
        """By row, from what `of` gave, once it is on the host."""
        most = (found.shape[1] - 1) // 2
        scores = {}
        for (row, top), (own, *likely) in zip(self._tops.items(), found.tolist(), strict=True):
            pairs = zip(map(int, likely[:top]), likely[most:], strict=False)
            scores[row] = Scored(own, tuple(pairs))
        return scores
