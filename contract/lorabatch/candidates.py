"""How many texts a job asks for, which of them it keeps, and what is told of their tokens.

`SamplingParams` has these fields beside its own. Each text is drawn with a seed of its own, which
follows from the job's. Raises what pydantic raises.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Final

from pydantic import Field, ValidationInfo, field_validator

from lorabatch.fields import Model

__all__ = [
    "MAX_CANDIDATES",
    "MAX_LOGPROBS",
    "MAX_TOP_LOGPROBS",
    "Bias",
    "Candidates",
    "TokenId",
    "seed_of",
]

MAX_CANDIDATES: Final = 16
MAX_TOP_LOGPROBS: Final = 20
MAX_LOGPROBS: Final = 200_000
"""That one result tells: 16 MB of JSON."""
MAX_SEED = 2**63 - 1
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]


class Candidates(Model):
    """`n` texts of `best_of` that are generated (None: of n): those with the highest mean log
    probability of a token. `logprobs` has each token told with its log probability, and with those
    of the `top_logprobs` most likely ones in its place."""

    n: int = Field(default=1, strict=True, ge=1, le=MAX_CANDIDATES)
    best_of: int | None = Field(default=None, strict=True, ge=1, le=MAX_CANDIDATES)
    logprobs: bool = Field(default=False, strict=True)
    top_logprobs: int = Field(default=0, strict=True, ge=0, le=MAX_TOP_LOGPROBS)

    @field_validator("best_of")
    @classmethod
    def _as_many_as_are_kept(cls, best_of: int | None, info: ValidationInfo) -> int | None:
        n = info.data.get("n", 1)
        if best_of is not None and best_of < n:
            raise ValueError(f"wanted n, which is {n}, or more; leave it out to keep all")
        return best_of

    @field_validator("top_logprobs")
    @classmethod
    def _told_with_logprobs(cls, top: int, info: ValidationInfo) -> int:
        if top and not info.data.get("logprobs", True):
            raise ValueError("wanted 0 without logprobs; add logprobs true")
        return top

    @property
    def candidates(self) -> int:
        """How many texts are generated."""
        return self.best_of or self.n

    @property
    def scored(self) -> bool:
        """Whether the log probabilities of its tokens are needed."""
        return self.logprobs or self.candidates > self.n

    @property
    def most_tokens(self) -> int | None:
        """How many new ones each text may have for their log probabilities to be told."""
        return MAX_LOGPROBS // (self.n * (1 + self.top_logprobs)) if self.logprobs else None


def seed_of(seed: int, number: int) -> int:
    """The seed of a job's text `number`, from 0, whose seed is the job's own."""
    if number == 0:
        return seed
    digest = hashlib.blake2b(b"%d#%d" % (seed, number), digest_size=8).digest()
    return int.from_bytes(digest, "big") & MAX_SEED
