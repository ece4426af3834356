"""The job: what a producer asks for, as JSON on the wire and as columns in the ledger.

Versioned (`schema_version`), strict about unknown fields, and checked before anything is
accepted. Times are UTC microseconds. Not covered: whether the adapter exists and whether the
prompt fits the context, which only a worker knows.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Final, Literal, Self
from uuid import uuid4

from pydantic import (
    AwareDatetime,
    BeforeValidator,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lorabatch.candidates import Bias, Candidates, TokenId
from lorabatch.errors import InvalidJob, explain, shown
from lorabatch.fields import (
    AdapterName,
    Identifier,
    Model,
    Stop,
    Text,
    is_identifier,
    storable,
)
from lorabatch.merged import MergedAdapters
from lorabatch.messages import ChatMessage
from lorabatch.outgoing import OutgoingUrl
from lorabatch.structured import StructuredOutputs
from lorabatch.tools import MAX_TOOLS, Tool, ToolChoice, check_tools

__all__ = [
    "SCHEMA_VERSION",
    "ChatMessage",
    "Job",
    "MergedAdapters",
    "SamplingParams",
    "StructuredOutputs",
    "is_identifier",
]

SCHEMA_VERSION: Final = 1
MAX_SEED = 2**63 - 1
ANY_CALLS: Final = {"tool_choice": "auto", "parallel_tool_calls": True}


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class SamplingParams(Candidates):
    """How the next token is picked. The defaults are greedy: the same job, the same text.

    `temperature` 0 takes the most likely token and ignores top_k, top_p, min_p, typical_p and seed;
    several texts want more than that. `typical_p` keeps the tokens whose surprise is closest to
    what is expected, with so much probability together. `logit_bias` is added to tokens' logits.
    `repetition_penalty` divides (multiplies if negative) the logits of tokens already seen in
    prompt or output; `frequency_penalty` and `presence_penalty` subtract for those in the output.
    A `stop` string ends the text just before it. Without `seed` one is derived from the job id,
    so that a retried job repeats itself; the result says which seed ran. `structured_outputs`: what
    the text must be like.
    """

    max_new_tokens: int = Field(default=256, strict=True, ge=1, le=131_072)
    temperature: float = Field(default=0.0, strict=True, ge=0, le=10, validate_default=True)
    top_k: int = Field(default=0, strict=True, ge=0, le=1_000_000, description="0: all tokens")
    top_p: float = Field(default=1.0, strict=True, gt=0.0, le=1.0)
    min_p: float = Field(default=0.0, strict=True, ge=0.0, le=1.0)
    typical_p: float = Field(default=1.0, strict=True, gt=0.0, le=1.0)
    logit_bias: dict[TokenId, Bias] = Field(default={}, max_length=300)
    repetition_penalty: float = Field(default=1.0, strict=True, gt=0.0, le=10.0)
    frequency_penalty: float = Field(default=0.0, strict=True, ge=-2.0, le=2.0)
    presence_penalty: float = Field(default=0.0, strict=True, ge=-2.0, le=2.0)
    stop: Annotated[tuple[Stop, ...], BeforeValidator(_as_list)] = Field(default=(), max_length=16)
    seed: int | None = Field(default=None, strict=True, ge=0, le=MAX_SEED)
    ignore_eos: bool = Field(default=False, strict=True)
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _structure_ends(self) -> Self:
        if self.structured_outputs is not None and self.ignore_eos:
            raise ValueError("ignore_eos: not with structured_outputs, which end; leave out one")
        return self

    @model_validator(mode="after")
    def _logprobs_fit(self) -> Self:
        if self.most_tokens is not None and self.max_new_tokens > self.most_tokens:
            raise ValueError(
                f"logprobs: with n {self.n} and top_logprobs {self.top_logprobs}, max_new_tokens "
                f"may be {self.most_tokens}, not {self.max_new_tokens}; lower one of them"
            )
        return self

    @field_validator("temperature")
    @classmethod
    def _texts_differ(cls, temperature: float, info: ValidationInfo) -> float:
        most = max(info.data.get("n", 1), info.data.get("best_of") or 1)
        if most > 1 and temperature == 0:
            raise ValueError(f"wanted above 0 for {most} texts (n, best_of), or they are all alike")
        return temperature

    @field_validator("stop")
    @classmethod
    def _stop_is_storable(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(storable(text) for text in stop)


class Job(Model):
    """One text to generate: a prompt or chat messages, an adapter, a tenant, sampling.

    `adapter_id` None is the base model itself, asked for on purpose, or the adapter that
    `merged_adapters` describes. A job is accepted once per (tenant, idempotency_key); without a key
    the job id is the key. A job that has not ended by `done_by` fails then as `deadline_passed`;
    of two with the same priority the one with the earlier deadline goes first. `tools` are for the
    chat template, which tells the model of them; `tool_choice` says whether it has to call them,
    `parallel_tool_calls` whether more than once.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    job_id: Identifier = Field(default_factory=lambda: str(uuid4()))
    tenant: Identifier = "default"
    adapter_id: AdapterName | None = None
    merged_adapters: MergedAdapters | None = None
    prompt: Text | None = None
    messages: tuple[ChatMessage, ...] | None = Field(default=None, min_length=1, max_length=1024)
    tools: tuple[Tool, ...] | None = Field(default=None, min_length=1, max_length=MAX_TOOLS)
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = Field(default=True, strict=True)
    sampling_params: SamplingParams = SamplingParams()
    priority: int = Field(default=0, strict=True, ge=-100, le=100, description="higher runs first")
    done_by: AwareDatetime | None = None
    idempotency_key: Annotated[str, StringConstraints(min_length=1, max_length=255)] | None = None
    batch_id: Identifier | None = None
    custom_id: Annotated[str, StringConstraints(min_length=1, max_length=512)] | None = None
    stream: bool = Field(default=False, strict=True, description="send the text as it grows")
    webhook: OutgoingUrl | None = Field(default=None, description="URL that is told of its end")

    @field_validator("prompt", "idempotency_key", "custom_id")
    @classmethod
    def _text_is_storable(cls, text: str | None) -> str | None:
        return None if text is None else storable(text)

    @model_validator(mode="after")
    def _prompt_or_messages(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            seen = "both" if self.prompt is not None else "neither"
            raise ValueError(f"give exactly one of prompt and messages, not {seen}")
        if self.prompt == "":
            raise ValueError("prompt is empty; give at least one character")
        return self

    @model_validator(mode="after")
    def _tools_fit(self) -> Self:
        if self.tools is None:
            if self.tool_choice != "auto" or not self.parallel_tool_calls:
                name = "parallel_tool_calls" if self.tool_choice == "auto" else "tool_choice"
                raise ValueError(f"{name}: only with tools; give some, or leave it out")
            return self
        if self.messages is None or self.sampling_params.structured_outputs is not None:
            other = "a prompt" if self.messages is None else "structured_outputs"
            raise ValueError(f"tools: not with {other}; leave out one of both")
        check_tools(self.tools, self.tool_choice)
        if self.constrained and self.sampling_params.ignore_eos:
            raise ValueError("ignore_eos: not with calls of a given form, which end; leave out one")
        return self

    @model_validator(mode="after")
    def _adapter_or_merge(self) -> Self:
        if self.adapter_id is not None and self.merged_adapters is not None:
            raise ValueError(
                f"give at most one of adapter_id and merged_adapters, not both (adapter_id "
                f"{self.adapter_id!r}, merged_adapters.ids {', '.join(self.merged_adapters.ids)})"
            )
        return self

    @model_validator(mode="after")
    def _one_text_is_followed(self) -> Self:
        texts = self.sampling_params.candidates
        if self.stream and texts > 1:
            raise ValueError(f"stream: one text can be followed, not {texts} (n, best_of)")
        return self

    @classmethod
    def parse(cls, fields: Any) -> Self:
        """A job from decoded JSON. Raises InvalidJob, which names the job and each bad field."""
        if not isinstance(fields, dict):
            raise InvalidJob(f"a job must be a JSON object, got {shown(fields)}")
        version = fields.get("schema_version", SCHEMA_VERSION)
        if version != SCHEMA_VERSION:
            raise InvalidJob(
                f"job {shown(fields.get('job_id'))}: schema_version {shown(version)} is not one "
                f"that this version reads ({SCHEMA_VERSION}); upgrade the worker or the producer"
            )
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            name = fields.get("job_id") or fields.get("custom_id")
            who = f"job {shown(name)}: " if name else "job: "
            raise InvalidJob(who + explain(error)) from None

    def body(self) -> dict[str, Any]:
        """What is generated from: the part kept as JSON in the ledger. Of the sampling parameters
        those that were given: the rest is for the adapter to say."""
        body = self.model_dump(
            mode="json",
            include={"schema_version", "prompt", "messages", "tools", "merged_adapters"},
            exclude_none=True,
        )
        calls = self.model_dump(mode="json", include=set(ANY_CALLS))
        body |= {name: value for name, value in calls.items() if value != ANY_CALLS[name]}
        given = self.sampling_params.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        streamed = {"stream": True} if self.stream else {}
        return {**body, "sampling_params": given, **streamed}

    def request_hash(self, body: dict[str, Any] | None = None) -> str:
        """sha256 of all that decides the outcome: the same key must bring the same hash.

        `body` spares making it again.
        """
        decides = {**(self.body() if body is None else body)}
        decides.pop("stream", None)
        what = [self.tenant, self.adapter_id, decides]
        text = json.dumps(what, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def adapter_name(self) -> str | None:
        """What routing, usage and reports know the adapter by; None: the base model."""
        return self.merged_adapters.name if self.merged_adapters else self.adapter_id

    @property
    def constrained(self) -> bool:
        """Whether a grammar says what its text may be, which a worker has to compile."""
        strict = any(tool.function.strict for tool in self.tools or ())
        held = strict or self.tool_choice != "auto" or not self.parallel_tool_calls
        return held or self.sampling_params.structured_outputs is not None

    @property
    def key(self) -> str:
        return self.idempotency_key or self.job_id

    @property
    def seed(self) -> int:
        """The seed that is used: the given one, or one derived from the job id."""
        if self.sampling_params.seed is not None:
            return self.sampling_params.seed
        digest = hashlib.sha256(self.job_id.encode()).digest()
        return int.from_bytes(digest[:8], "big") & MAX_SEED
