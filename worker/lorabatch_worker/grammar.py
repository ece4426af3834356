"""Which tokens a constrained sequence may take next, and the logits of all others.

    matcher   knows what the text so far allows; `take` moves it on by a token
    mask      one bit a token id, from the matcher; end tokens where the text may end
    logits    -infinity where the bit is 0, before penalties and before a token is picked

Steps without constrained sequences pay nothing. Masks are made on the host while a GPU computes the
logits; there is one copy and one operation for all of them. A token id that the tokenizer does not
have is never allowed. Shapes: logits [rows, vocabulary]. Raises nothing: a grammar that cannot go
on says so by `failed`, and its sequence has to be ended.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Constrained", "Grammar", "constrain"]

WORD = 32  # bits


class Grammar:
    """Of one sequence: what the job's grammar still allows. `words` of a mask."""

    def __init__(self, matcher: Any, words: int, own_end: int, end_ids: frozenset[int]) -> None:
        """`own_end`: the end token that the matcher knows; `end_ids`: all that end the sequence,
        which it may be none of."""
        self._matcher = matcher
        self.words = words
        self._own_end = own_end
        self._end_ids = end_ids
        self.failed = False
        """It got too complex, or nothing is allowed any more."""

    def copy(self) -> Grammar:
        """For another text of the same job, before either has taken a token."""
        return Grammar(self._matcher.deep_copy(), self.words, self._own_end, self._end_ids)

    def take(self, token: int) -> None:
        """The sequence has this token, which ends nothing."""
        if not self.failed and not self._matcher.consume_token(token):
            self.failed = True

    def fill(self, mask: NDArray[np.uint32]) -> None:
        """Set the bits of what may come next, [words or more], zero before."""
        if not self.failed:
            size = self.words * WORD // 8
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, size)
            may_end = _bit(mask, self._own_end)
            for token in {self._own_end} | self._end_ids:
                word, bit = divmod(token, WORD)
                if word < len(mask):
                    mask[word] &= ~np.uint32(1 << bit)
                    mask[word] |= np.uint32((may_end and token in self._end_ids) << bit)
            self.failed = self._matcher.is_error() or not mask.any()


class Constrained(Protocol):
    """A sequence, as it is seen from here."""

    @property
    def grammar(self) -> Grammar | None: ...


def constrain(logits: Tensor, sequences: List[Constrained]) -> None:
    """Change the logits of those that have a grammar, in place."""
    rows = [row for row, one in enumerate(sequences) if one.grammar is not None]
    if not rows:
        return
    on_gpu = logits.device.type == "cuda"
    words = -(-logits.shape[1] // WORD)
    grammars = [one.grammar for one in sequences if one.grammar is not None]
    most = max(words, *(grammar.words for grammar in grammars))
    sent = torch.zeros((len(rows), most), dtype=torch.int32, pin_memory=on_gpu)
    masks = sent.numpy().view(np.uint32)
    for grammar, mask in zip(grammars, masks, strict=True):
        grammar.fill(mask)
    bias = _bias(sent, logits)[:, : logits.shape[1]]
    if len(rows) == len(logits):
        logits += bias
    else:
        which = torch.tensor(rows, pin_memory=on_gpu).to(logits.device, non_blocking=True)
        logits[which] = logits[which] + bias


def _bias(sent: Tensor, logits: Tensor) -> Tensor:
    """0 where a bit is 1, else -infinity. A table of bytes and a sum take a fifth of the time on a
    CPU that masked_fill does."""
    packed = sent.to(logits.device, non_blocking=True).view(torch.uint8)
    table = _table(logits.dtype, logits.device)
    return table.index_select(0, packed.flatten().int()).view(len(sent), -1)


@cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What each byte's bits add, [256, 8], the lowest bit first."""
    with torch.inference_mode(False):  # who asks next may not be in that mode
        bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
        table = torch.zeros(256, 8, dtype=dtype)
        return table.masked_fill_(bits == 0, -torch.inf).to(device)


def _bit(mask: NDArray[np.uint32], token: int) -> int:
    word, bit = divmod(token, WORD)
    return int(mask[word]) >> bit & 1
