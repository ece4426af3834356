"""The result: what a job ended as, and the usage it is billed for.

Token counts are of the base model's tokenizer, or of an adapter's that adds tokens. `output_tokens`
counts every token generated, the end token and those of a stop string included; `text` leaves those
two out, and log probabilities do not. Of several texts it counts all, those not kept too.
Times are UTC microseconds since 1970.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from lorabatch.job import SCHEMA_VERSION

__all__ = [
    "TERMINAL_STATES",
    "Choice",
    "ErrorInfo",
    "FinishReason",
    "JobState",
    "LikelyToken",
    "Result",
    "Token",
    "Usage",
]

JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]
OutcomeState = Literal["succeeded", "failed", "cancelled"]
TERMINAL_STATES: frozenset[JobState] = frozenset({"succeeded", "failed", "cancelled"})
FinishReason = Literal["eos_token", "stop_sequence", "length"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Usage(_Model):
    """Tokens of one job: `cached_tokens` are the part of the prompt that was not recomputed."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelyToken:
    """A token and its log probability by the model alone: before biases, penalties, temperature.
    `utf8`: its bytes where they are not those of `text`, because it is part of a character."""

    token_id: int
    text: str
    logprob: float
    special: bool = False
    utf8: tuple[int, ...] | None = None

    @property
    def raw(self) -> list[int]:
        """The token's bytes."""
        return list(self.text.encode() if self.utf8 is None else self.utf8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Token(LikelyToken):
    """One that was generated; `top`: the most likely ones in its place, the first one first."""

    top: tuple[LikelyToken, ...] = ()


class Choice(_Model):
    """One of a job's texts. `tokens` where log probabilities were asked for."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    seed: int | None = None
    tokens: tuple[Token, ...] | None = None

    @property
    def mean_logprob(self) -> float:
        """Of its tokens, where they are told."""
        found = [token.logprob for token in self.tokens or ()]
        return sum(found) / max(1, len(found))


class ErrorInfo(_Model):
    """Why a job failed: a code of the error tree and a sentence without paths or prompts."""

    code: str
    message: str


class Result(_Model):
    """One per job, written once. `text` is None unless the job succeeded.

    `choices` has the texts where several or log probabilities were asked for; `text`, `token_ids`,
    `finish_reason` and `seed` are those of the first one. `discarded` has the token ids of texts
    that were generated and not kept."""

    schema_version: Literal[1] = SCHEMA_VERSION
    job_id: str
    tenant: str
    adapter_id: str | None
    adapter_version: str | None = None
    base_model: str | None = None
    custom_id: str | None = None
    batch_id: str | None = None
    state: OutcomeState
    text: str | None = None
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    seed: int | None = None
    choices: tuple[Choice, ...] | None = None
    discarded: tuple[tuple[int, ...], ...] | None = None
    usage: Usage = Usage()
    error: ErrorInfo | None = None
    attempt: int = 0
    submitted_us: int | None = None
    started_us: int | None = None
    finished_us: int | None = None

    @property
    def texts(self) -> tuple[Choice, ...]:
        """All of a job that succeeded, one at least."""
        return self.choices or (
            Choice(
                text=self.text or "",
                token_ids=self.token_ids,
                finish_reason=self.finish_reason,
                seed=self.seed,
            ),
        )
