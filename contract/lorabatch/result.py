"""The result: what a job ended as, and the usage it is billed for.

Token counts are of the base model's tokenizer, or of an adapter's that adds tokens. `output_tokens`
counts every token generated, the end token and those of a stop string included; `text` leaves those
two out.
Times are UTC microseconds since 1970.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from lorabatch.job import SCHEMA_VERSION

__all__ = ["TERMINAL_STATES", "ErrorInfo", "FinishReason", "JobState", "Result", "Usage"]

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


class ErrorInfo(_Model):
    """Why a job failed: a code of the error tree and a sentence without paths or prompts."""

    code: str
    message: str


class Result(_Model):
    """One per job, written once. `text` is None unless the job succeeded."""

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
    usage: Usage = Usage()
    error: ErrorInfo | None = None
    attempt: int = 0
    submitted_us: int | None = None
    started_us: int | None = None
    finished_us: int | None = None
