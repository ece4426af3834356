"""Next tokens for a batch of sequences, each with its own parameters and seed.

The random number of a row is a hash of (seed, position), and the token is found by inverting
the distribution at it, so a job's tokens do not depend on its row, its batch or the device's
random state. Logits are taken in float32. Order: grammar, logit_bias, penalties, temperature,
top_k, top_p, min_p, typical_p.
Rows whose adapters add tokens are drawn apart from the others, so that nobody's tokens depend on
how wide the others' logits are.

Nothing here waits for a GPU but `Draw.wait`: what the rows want goes there in one copy, made while
it still computes the logits, and the tokens come back in another.
Shapes: logits [rows, vocabulary].
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence as List

import torch
from torch import Tensor

from lorabatch_kernels import argmax, can_argmax
from lorabatch_worker.grammar import constrain
from lorabatch_worker.packing import Packed
from lorabatch_worker.scores import Scores
from lorabatch_worker.sequence import Scored, Sequence
from lorabatch_worker.typical import typical

__all__ = ["UNSOUND", "Draw", "sample", "uniform"]

UNSOUND = -1


class Draw:
    """Next tokens of a batch, on their way to the host."""

    def __init__(
        self, logits: Tensor, sequences: List[Sequence], vocabulary: int | None = None
    ) -> None:
        """Changes `logits`, where they are float32 or constrained. `vocabulary`: of the base model,
        if they may be wider."""
        widths = [s.vocabulary or vocabulary or logits.shape[1] for s in sequences]
        scored = any(s.params.scored for s in sequences)
        self._scores = Scores(logits, sequences, widths) if scored else None
        constrain(logits, sequences)
        tokens = _drawn(logits, sequences, widths)
        self._found = [tokens] if self._scores is None else [tokens, self._scores.of(tokens)]
        self._came: torch.cuda.Event | None = None
        self.scores: dict[int, Scored] = {}
        """By row, once its tokens were waited for: of those whose sequences want them."""
        if tokens.device.type == "cuda":
            self._found = [_to_host(found) for found in self._found]
            self._came = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._came.record()

    def wait(self) -> list[int]:
        """One token id a row; UNSOUND where the logits hold NaN or infinity."""
        if self._came is not None:
            self._came.synchronize()
        if self._scores is not None:
            self.scores = self._scores.read(self._found[1])
        return [int(t) for t in self._found[0].tolist()]


def _to_host(tensor: Tensor) -> Tensor:
    """A copy that is complete once the device has come so far."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on the seed and the position alone."""
    digest = hashlib.blake2b(b"%d/%d" % (seed, position), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2.0**53


def sample(logits: Tensor, sequences: List[Sequence]) -> list[int]:
    """One token id a row, of logits that are sound."""
    wishes = _Wishes(sequences, logits.device)
    return [int(t) for t in _choose(logits, wishes).tolist()]


def _drawn(logits: Tensor, sequences: List[Sequence], widths: List[int]) -> Tensor:
    """[rows], each of as many columns as there are tokens for it."""
    if set(widths) <= {logits.shape[1]}:
        return _sound(logits, sequences)
    tokens = torch.empty(len(widths), dtype=torch.int64, device=logits.device)
    for width in set(widths):
        rows = [row for row, own in enumerate(widths) if own == width]
        at = torch.tensor(rows, device=logits.device)
        part = logits[at, :width].contiguous()
        tokens[at] = _sound(part, [sequences[row] for row in rows])
    return tokens


def _sound(logits: Tensor, sequences: List[Sequence]) -> Tensor:
    """[rows]; UNSOUND where the logits hold NaN or infinity."""
    wishes = _Wishes(sequences, logits.device)
    if wishes.none and can_argmax(logits):
        return argmax(logits)  # which says -1 itself
    sound = logits.amax(dim=-1).isfinite()
    return torch.where(sound, _choose(logits, wishes), UNSOUND)


def _choose(logits: Tensor, wishes: _Wishes) -> Tensor:
    """[rows], on the device of the logits."""
    logits = logits.float()
    wishes.penalize(logits)
    tokens = argmax(logits) if can_argmax(logits) else logits.argmax(dim=-1)
    if wishes.random:
        tokens[wishes.rows] = wishes.draw(logits[wishes.rows])
    return tokens


class _Wishes:
    """What the rows ask for beyond the most likely token, as tensors on the device."""

    def __init__(self, sequences: List[Sequence], device: torch.device) -> None:
        self.random = [s for s in sequences if s.params.temperature > 0.0]
        self._penalized = any(_is_penalized(s) for s in sequences)
        self.none = not (self.random or self._penalized)
        if self.none:
            return
        packed = Packed()
        _add_repeated(packed, sequences)
        _add_made(packed, sequences)
        _add_biases(packed, sequences)
        params = [s.params for s in self.random]
        self._top_k = max((p.top_k for p in params), default=0)
        rows = [i for i, s in enumerate(sequences) if s.params.temperature > 0.0]
        nucleus = [i for i, p in enumerate(params) if p.top_p < 1.0]
        usual = [i for i, p in enumerate(params) if p.typical_p < 1.0]
        for ints in (rows, [p.top_k for p in params], nucleus, usual):
            packed.add(ints, torch.int64)
        uniforms = [uniform(s.seed, len(s.output)) for s in self.random]
        for numbers in (
            [p.temperature for p in params],
            [p.min_p for p in params],
            uniforms,
            [params[i].top_p for i in nucleus],
            [params[i].typical_p for i in usual],
        ):
            packed.add(numbers, torch.float64)
        tables = packed.views(packed.send(device))
        self._repeated, self._made, self._biases = tables[:3], tables[3:8], tables[8:11]
        self.rows, self._limits, self._nucleus, self._usual = tables[11:15]
        self._temperature, self._min_p, self._uniform, self._top_p, self._typical_p = tables[15:]

    def penalize(self, logits: Tensor) -> None:
        """In place: biases, then repetition over prompt and output, then frequency and presence
        over the output."""
        if not self._penalized:
            return
        row, token, bias = self._biases
        logits[row, token] += bias
        row, token, factor = self._repeated
        values = logits[row, token]
        logits[row, token] = torch.where(values > 0, values / factor, values * factor)
        row, token, count, frequency, presence = self._made
        logits[row, token] -= frequency * count + presence

    def draw(self, logits: Tensor) -> Tensor:
        """Tokens of rows with a temperature. logits [n, vocabulary] -> [n].

        In float64, so that neither the batch's shape nor a tiny temperature decides a token.
        """
        highest = logits.max(dim=-1, keepdim=True).values
        scaled = (logits.double() - highest) / self._temperature[:, None]
        if self._top_k:
            scaled.masked_fill_(self._below_top_k(logits), -torch.inf)
        p = scaled.softmax(dim=-1)
        least = self._min_p[:, None] * p.max(dim=-1, keepdim=True).values
        dropped = p < least
        if self._nucleus.shape[0]:
            dropped[self._nucleus] |= self._past_top_p(p[self._nucleus])
        p.masked_fill_(dropped, 0.0)
        if self._usual.shape[0]:
            p[self._usual] = typical(p[self._usual], self._typical_p)
        cumulative = p.cumsum(dim=-1)
        draws = self._uniform[:, None] * cumulative[:, -1:]
        picked = torch.searchsorted(cumulative, draws, right=True)
        return picked.clamp_(max=logits.shape[-1] - 1)[:, 0]

    def _below_top_k(self, logits: Tensor) -> Tensor:
        """True where a logit is below its row's k-th highest; of equal ones all stay."""
        vocabulary = logits.shape[-1]
        values = logits.topk(min(self._top_k, vocabulary), dim=-1).values
        last = (self._limits.clamp(max=vocabulary) - 1).clamp_(min=0)[:, None]
        return (self._limits > 0)[:, None] & (logits < values.gather(-1, last))

    def _past_top_p(self, p: Tensor) -> Tensor:
        """True for tokens that the more likely ones make superfluous; of equal ones the lower id
        counts as the more likely, and the most likely token always stays."""
        values, order = p.sort(dim=-1, descending=True, stable=True)
        past = values.cumsum(dim=-1) - values >= self._top_p[:, None]
        past[:, 0] = False
        return torch.zeros_like(past).scatter(-1, order, past)


def _is_penalized(sequence: Sequence) -> bool:
    p = sequence.params
    more = p.frequency_penalty or p.presence_penalty or p.logit_bias
    return p.repetition_penalty != 1.0 or bool(more)


def _add_repeated(packed: Packed, sequences: List[Sequence]) -> None:
    """Row, token and factor of each token that a row has seen, where that matters."""
    rows: list[int] = []
    tokens: list[int] = []
    factors: list[float] = []
    for row, sequence in enumerate(sequences):
        factor = sequence.params.repetition_penalty
        if factor != 1.0:
            seen = sorted({*sequence.prompt, *sequence.output})
            rows += [row] * len(seen)
            tokens += seen
            factors += [factor] * len(seen)
    packed.add(rows, torch.int64)
    packed.add(tokens, torch.int64)
    packed.add(factors, torch.float32)


def _add_made(packed: Packed, sequences: List[Sequence]) -> None:
    """Row, token, how often, frequency and presence penalty of each token that a row has made."""
    rows: list[int] = []
    made: list[int] = []
    counts: list[int] = []
    frequencies: list[float] = []
    presences: list[float] = []
    for row, sequence in enumerate(sequences):
        p = sequence.params
        if p.frequency_penalty or p.presence_penalty:
            found = Counter(sequence.output)
            rows += [row] * len(found)
            made += found
            counts += found.values()
            frequencies += [p.frequency_penalty] * len(found)
            presences += [p.presence_penalty] * len(found)
    packed.add(rows, torch.int64)
    packed.add(made, torch.int64)
    for numbers in (counts, frequencies, presences):
        packed.add(numbers, torch.float32)


def _add_biases(packed: Packed, sequences: List[Sequence]) -> None:
    """Row, token and bias."""
    found = [
        (row, *pair) for row, s in enumerate(sequences) for pair in s.params.logit_bias.items()
    ]
    packed.add([row for row, _, _ in found], torch.int64)
    packed.add([token for _, token, _ in found], torch.int64)
    packed.add([bias for _, _, bias in found], torch.float32)
