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

BLOCK_COLUMNS = 256


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on the seed and the position alone."""
    digest = hashlib.blake2b(b"%d/%d" % (seed, position), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2.0**53


def sample(logits: Tensor, sequences: List[Sequence]) -> list[int]:
    """One token id a row."""
    logits = logits.float()
    _penalize(logits, sequences)
    tokens = _argmax(logits)
    rows = [i for i, s in enumerate(sequences) if s.params.temperature > 0.0]
    if rows:
        index = torch.tensor(rows, device=logits.device)
        tokens[index] = _draw(logits[index], [sequences[i] for i in rows])
    return [int(t) for t in tokens.tolist()]


def _argmax(logits: Tensor) -> Tensor:
    """[rows]: the first of the highest; on a CPU by way of the maxima of blocks of columns, because
    torch reduces to a value with vector instructions, but to an index without."""
    vocabulary = logits.shape[-1]
    blocks = vocabulary // BLOCK_COLUMNS
    if logits.device.type != "cpu" or blocks < 2:
        return logits.argmax(dim=-1)
    whole = blocks * BLOCK_COLUMNS
    highest = torch.unflatten(logits[:, :whole], 1, (blocks, BLOCK_COLUMNS)).amax(dim=-1)
    if whole < vocabulary:
        highest = torch.cat([highest, logits[:, whole:].amax(dim=-1, keepdim=True)], dim=-1)
    first = highest.argmax(dim=-1, keepdim=True) * BLOCK_COLUMNS
    columns = (first + torch.arange(BLOCK_COLUMNS)).clamp_(max=vocabulary - 1)
    within = logits.gather(1, columns).argmax(dim=-1, keepdim=True)
    tokens: Tensor = columns.gather(1, within)[:, 0]
    return tokens


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
    """Tokens of rows with a temperature. logits [n, vocabulary] -> [n].

    In float64, so that neither the batch's shape nor a tiny temperature decides a token.
    """
    params = [s.params for s in sequences]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    highest = logits.max(dim=-1, keepdim=True).values
    scaled = (logits.double() - highest) / column([p.temperature for p in params])
    scaled.masked_fill_(_below_top_k(logits, [p.top_k for p in params]), -torch.inf)
    p = scaled.softmax(dim=-1)
    least = column([q.min_p for q in params]) * p.max(dim=-1, keepdim=True).values
    p.masked_fill_((p < least) | _past_top_p(p, [q.top_p for q in params]), 0.0)
    cumulative = p.cumsum(dim=-1)
    draws = column([uniform(s.claim.job.seed, len(s.output)) for s in sequences])
    picked = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
    return picked.clamp_(max=logits.shape[-1] - 1)[:, 0]


def _below_top_k(logits: Tensor, top_k: List[int]) -> Tensor:
    """True where a logit is below its row's k-th highest; of equal ones all stay."""
    vocabulary = logits.shape[-1]
    limits = [min(k, vocabulary) if k else 0 for k in top_k]
    dropped = torch.zeros_like(logits, dtype=torch.bool)
    if any(limits):
        values = logits.topk(max(limits), dim=-1).values
        index = torch.tensor([max(k - 1, 0) for k in limits], device=logits.device)[:, None]
        rows = torch.tensor([k > 0 for k in limits], device=logits.device)[:, None]
        dropped = rows & (logits < values.gather(-1, index))
    return dropped


def _past_top_p(p: Tensor, top_p: List[float]) -> Tensor:
    """True for tokens that the more likely ones make superfluous; of equal ones the lower id
    counts as the more likely, and the most likely token always stays."""
    dropped = torch.zeros_like(p, dtype=torch.bool)
    rows = [i for i, limit in enumerate(top_p) if limit < 1.0]
    if rows:
        index = torch.tensor(rows, device=p.device)
        values, order = p[index].sort(dim=-1, descending=True, stable=True)
        limits = torch.tensor([top_p[i] for i in rows], dtype=p.dtype, device=p.device)
        past = values.cumsum(dim=-1) - values >= limits[:, None]
        past[:, 0] = False
        dropped[index] = torch.zeros_like(past).scatter(-1, order, past)
    return dropped
