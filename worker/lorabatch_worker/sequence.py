"""One text of a job inside the engine: its tokens, how far they are computed, where its KV lies.

Token ids are the base model's, and those that the adapter adds. `computed` counts tokens whose keys
and values are in the cache; a sequence is in prefill while more than its last token is missing
there. The sequences of a job are a family: it begins with the first of them and is over with the
last, or as soon as one fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from typing import NamedTuple

from lorabatch.candidates import seed_of
from lorabatch.job import SamplingParams
from lorabatch.ledger import Claim
from lorabatch.result import FinishReason
from lorabatch_worker.adapters.weights import Adapter
from lorabatch_worker.grammar import Grammar
from lorabatch_worker.stop import StopWatch

__all__ = ["Family", "Scored", "Sequence"]


class Scored(NamedTuple):
    """A token's log probability, and the most likely tokens in its place with theirs."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Family:
    """All sequences of one job, by their numbers. `closed`: the job's end was reported, or will be
    from what they are now."""

    members: list[Sequence]
    begun: bool = False
    closed: bool = False

    @classmethod
    def of(cls, count: int, make: Callable[[], Sequence]) -> Family:
        family = cls([make() for _ in range(count)])
        for number, sequence in enumerate(family.members):
            sequence.number, sequence.family = number, family
        return family

    def begins(self) -> bool:
        """One of them begins to run: whether it is the first one."""
        first, self.begun = not self.begun, True
        return first

    @property
    def is_over(self) -> bool:
        return all(s.finish_reason is not None for s in self.members)


@dataclass(eq=False)
class Sequence:
    """State of one running or waiting text. `slot` -1 is the base model alone. `params` are the
    job's own unless others are given, with what its adapter wants where the job says nothing."""

    claim: Claim
    prompt: list[int]
    adapter: Adapter | None
    stop_watch: StopWatch | None = None
    output: list[int] = field(default_factory=list)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    """Of the first full blocks, as far as anyone asked; see block_manager."""
    cached_tokens: int = 0
    """Of the prompt: those that were in the cache when it began to run."""
    charged_tokens: int = 0
    """To its tenant, for what it was given before it left its place last; see fair_share."""
    preempted: bool = False
    slot: int = -1
    finish_reason: FinishReason | None = None
    waiting_since_s: float = field(default_factory=time.monotonic)
    effective: InitVar[SamplingParams | None] = None
    end_ids: frozenset[int] = frozenset()
    """The adapter's own end tokens, beside the base model's."""
    number: int = 0
    scores: list[Scored] = field(default_factory=list)
    """Of the output's tokens, where `params.scored`."""
    grammar: Grammar | None = None
    """What the text must be like, as far as it has come."""
    params: SamplingParams = field(init=False)
    family: Family = field(init=False)

    def __post_init__(self, effective: SamplingParams | None) -> None:
        self.family = Family([self])
        self.params = self.claim.job.sampling_params if effective is None else effective

    @property
    def job_id(self) -> str:
        return self.claim.job.job_id

    @property
    def key(self) -> str:
        """Among all sequences. The first one's is the job's id."""
        return f"{self.job_id}#{self.number}" if self.number else self.job_id

    @property
    def seed(self) -> int:
        return seed_of(self.claim.job.seed, self.number)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def max_length(self) -> int:
        return len(self.prompt) + self.params.max_new_tokens

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return self.length - self.computed

    @property
    def adapter_version(self) -> str | None:
        return self.adapter.version if self.adapter else None

    @property
    def vocabulary(self) -> int | None:
        """Token ids that there are, where its adapter has not as many as the base model."""
        return self.adapter.vocabulary_size if self.adapter else None

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids of positions [start, end)."""
        split = len(self.prompt)
        if start >= split:
            return self.output[start - split : end - split]
        if end <= split:
            return self.prompt[start:end]
        return self.prompt[start:] + self.output[: end - split]

    def append(self, token: int, eos_ids: frozenset[int], scored: Scored | None = None) -> None:
        """Take the next token and see whether it ends the sequence."""
        self.output.append(token)
        if scored is not None:
            self.scores.append(scored)
        ends = token in eos_ids or token in self.end_ids
        if ends and not self.params.ignore_eos:
            self.finish_reason = "eos_token"
            return
        if self.grammar is not None:
            self.grammar.take(token)
        if self.stop_watch is not None and self.stop_watch.saw(token):
            self.finish_reason = "stop_sequence"
        elif len(self.output) >= self.params.max_new_tokens:
            self.finish_reason = "length"
