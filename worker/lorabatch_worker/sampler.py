"""Next tokens for a batch of sequences, each with its own parameters and seed.

The random number of a row is a hash of (seed, position), and the token is found by inverting
the distribution at it, so a job's tokens do not depend on its row, its batch or the device's
random state. Logits are taken in float32. Order: penalties, temperature, top_k, top_p, min_p.
Shapes: logits [rows, vocabulary].
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence as List

import torch
from torch import Tensor

from lorabatch_worker.sequence import Sequence

__all__ = ["sample", "uniform"]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on the seed and the position alone."""
    digest = hashlib.blake2b(b"%d/%d" % (seed, position), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2.0**53


def sample(logits: Tensor, sequences: List[Sequence]) -> list[int]:
    """One token id a row."""
    logits = logits.float()
    _penalize(logits, sequences)
    tokens = logits.argmax(dim=-1)
    rows = [i for i, s in enumerate(sequences) if s.params.temperature > 0.0]
    if rows:
        index = torch.tensor(rows, device=logits.device)
        tokens[index] = _draw(logits[index], [sequences[i] for i in rows])
    return [int(t) for t in tokens.tolist()]


def _penalize(logits: Tensor, sequences: List[Sequence]) -> None:
    """In place: repetition over prompt and output, frequency and presence over the output."""
    for row, sequence in enumerate(sequences):
        p = sequence.params
        if p.repetition_penalty != 1.0:
            seen = torch.tensor(sorted({*sequence.prompt, *sequence.output}), device=logits.device)
            values = logits[row, seen]
            factor = p.repetition_penalty
            logits[row, seen] = torch.where(values > 0, values / factor, values * factor)
        if sequence.output and (p.frequency_penalty or p.presence_penalty):
            made = Counter(sequence.output)
            ids = torch.tensor(list(made), device=logits.device)
            counts = torch.tensor(list(made.values()), device=logits.device)
            logits[row, ids] -= p.frequency_penalty * counts + p.presence_penalty


def _draw(logits: Tensor, sequences: List[Sequence]) -> Tensor:
    """Tokens of rows with a temperature. logits [n, vocabulary] -> [n]."""
    device = logits.device

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

    params = [s.params for s in sequences]
    vocabulary = logits.shape[-1]
    limits = [p.top_k if 0 < p.top_k < vocabulary else vocabulary for p in params]
    # Without top_p, no more than the largest top_k has to be sorted.
    width = max(limits)
    values, order = _ranked(logits, width)
    # In float64, so that neither the width nor a tiny temperature decides a token.
    values = (values.double() - values[:, :1].double()) / column([p.temperature for p in params])
    rank = torch.arange(width, device=device)[None]
    values = values.masked_fill(rank >= torch.tensor(limits, device=device)[:, None], -torch.inf)
    probabilities = values.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # The most likely token always stays.
    dropped = before >= column([p.top_p for p in params])
    dropped |= probabilities < column([p.min_p for p in params]) * probabilities[:, :1]
    dropped[:, 0] = False
    cumulative = probabilities.masked_fill(dropped, 0.0).cumsum(dim=-1)
    draws = [uniform(s.claim.job.seed, len(s.output)) for s in sequences]
    target = column(draws) * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, target, right=True).clamp_(max=width - 1)
    return order.gather(-1, picked)[:, 0]


def _ranked(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The highest values and their ids [n, width]; of equal values the lower id comes first, which
    topk leaves open, so that a row's order does not depend on the other rows' widths."""
    if width == logits.shape[-1]:
        values, order = logits.sort(dim=-1, descending=True, stable=True)
        return values, order
    values, order = logits.topk(width + 1, dim=-1)
    if bool((values[:, -2] == values[:, -1]).any()):
        bits = (logits + 0.0).view(torch.int32)  # float bits that sort as whole numbers do
        ordered = (bits ^ ((bits >> 31) & 0x7FFF_FFFF)).long() << 32
        keys = ordered - torch.arange(logits.shape[-1], device=logits.device)
        order = keys.topk(width, dim=-1).indices
    order = order[:, :width].sort(dim=-1).values
    values, at = logits.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, order.gather(-1, at)
