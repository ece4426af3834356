"""What a bulk file would take, from its rows and from what the ledger has of past jobs.

No tokenizer is here: prompts are counted in characters, and turned into tokens by what past jobs
of the base model had, or by a rule of thumb. Accepts nothing. Memory: a row, and a few numbers for
each adapter. Raises InvalidJob and LoraBatchError for files that cannot be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lorabatch import Job, Settings
from lorabatch.errors import JobNotFound
from lorabatch.queues import Queues
from lorabatch_producer.batch import base_names_of, batch_id_for
from lorabatch_producer.bulk import BadLine
from lorabatch_producer.client import Producer
from lorabatch_producer.inputs import Inputs
from lorabatch_producer.past import Past, asked_chars, past_of

__all__ = ["GPU_SLOTS", "RULE_OF_THUMB", "AdapterRows", "Estimate", "estimate", "slots_of"]

RULE_OF_THUMB = 4.0  # characters a token, of English with the vocabularies of today
GPU_SLOTS = 8  # where LORABATCH_ADAPTER_SLOTS is 0
ADAPTER_FIELDS = ("adapter_id", "rows", "prompt_tokens", "output_tokens_max", "output_tokens")


@dataclass
class AdapterRows:
    """The rows for one adapter; None: the base model. `mean`: tokens that its past jobs generated,
    None: it has none. `output_tokens`: by that mean, or the most where there is none."""

    adapter_id: str | None
    mean: float | None
    chars_per_token: float
    rows: int = 0
    prompt_chars: int = 0
    output_tokens_max: int = 0
    expected: float = 0.0

    @property
    def prompt_tokens(self) -> int:
        return math.ceil(self.prompt_chars / self.chars_per_token)

    @property
    def output_tokens(self) -> int:
        return math.ceil(self.expected)

    def add(self, job: Job) -> None:
        most = job.sampling_params.max_new_tokens * job.sampling_params.candidates
        self.rows += 1
        self.prompt_chars += asked_chars(job)
        self.output_tokens_max += most
        self.expected += most if self.mean is None else min(self.mean, most)


@dataclass
class Estimate:
    """Of files that would be `batch_id`. `slots`: adapters that fit at once, by kind of device."""

    base_model: str
    batch_id: str
    known: bool
    past: Past
    slots: dict[str, int]
    rejected: int = 0
    adapters: dict[str | None, AdapterRows] = field(default_factory=dict)

    @property
    def chars_per_token(self) -> float:
        return self.past.chars_per_token or RULE_OF_THUMB

    @property
    def swaps(self) -> dict[str, int]:
        """How often an adapter has to make room for another, at the least."""
        named = len(self.adapters.keys() - {None})
        return {device: max(0, named - slots) for device, slots in self.slots.items()}

    @property
    def unmeasured(self) -> list[str | None]:
        """Adapters whose past jobs say nothing of how much they generate."""
        return [one.adapter_id for one in self.by_name if one.mean is None]

    @property
    def by_name(self) -> list[AdapterRows]:
        return sorted(self.adapters.values(), key=lambda one: one.adapter_id or "")

    def total(self, name: str) -> int:
        """Of all adapters."""
        return sum(getattr(one, name) for one in self.adapters.values())

    def seconds(self, output: str) -> float | None:
        """At the pace of past jobs, with `output_tokens` or `output_tokens_max`."""
        tokens = self.total("prompt_tokens") + self.total(output)
        return tokens / self.past.tokens_per_s if self.past.tokens_per_s else None

    def add(self, job: Job) -> None:
        name = job.adapter_name
        if name not in self.adapters:
            mean = self.past.output_tokens.get(name)
            self.adapters[name] = AdapterRows(name, mean, self.chars_per_token)
        self.adapters[name].add(job)

    def as_json(self) -> dict[str, Any]:
        """What the command prints for programs. Times: seconds; null: unknown."""
        measured = self.past.chars_per_token is not None
        return {
            "base_model": self.base_model,
            "batch_id": self.batch_id,
            "submitted_before": self.known,
            **{name: self.total(name) for name in ADAPTER_FIELDS[1:]},
            "bad_rows": self.rejected,
            "chars_per_token": self.chars_per_token,
            "chars_per_token_from": "past jobs" if measured else "rule of thumb",
            "adapters": [
                {name: getattr(one, name) for name in ADAPTER_FIELDS}
                | {"output_tokens_from": "max_new_tokens" if one.mean is None else "past jobs"}
                for one in self.by_name
            ],
            "slots": self.slots,
            "swaps_at_least": self.swaps,
            "past_jobs": self.past.jobs,
            "tokens_per_s": self.past.tokens_per_s,
            "seconds": self.seconds("output_tokens"),
            "seconds_max": self.seconds("output_tokens_max"),
        }


def estimate(
    producer: Producer, inputs: Inputs, tenant: str, on_bad: Callable[[BadLine], None]
) -> Estimate:
    """Read every row as a submission would; `on_bad` is told of those that are no jobs."""
    inputs.check()
    engine, settings = producer.ledger.engine, producer.settings
    base_model = Queues(engine).list().get(settings.queue, settings.base_model)
    batch_id = batch_id_for(tenant, inputs.digest())
    known = _known(producer, batch_id)
    past = past_of(engine, base_model)
    found = Estimate(base_model, batch_id, known, past, slots_of(settings))
    for line in inputs.lines(batch_id, tenant, base_names_of(producer)):
        if isinstance(line, BadLine):
            found.rejected += 1
            on_bad(line)
        else:
            found.add(line.job)
    return found


def slots_of(settings: Settings) -> dict[str, int]:
    """Adapters that fit at once on a worker with these settings, by kind of device."""
    both = {"cpu": settings.max_seqs, "gpu": GPU_SLOTS}
    here = "gpu" if settings.device.startswith("cuda") else settings.device
    return {
        kind: settings.adapter_slots or slots
        for kind, slots in both.items()
        if here in (kind, "auto")
    }


def _known(producer: Producer, batch_id: str) -> bool:
    try:
        producer.status(batch_id)
    except JobNotFound:
        return False
    return True
