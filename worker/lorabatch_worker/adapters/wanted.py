"""What a job asks for: an adapter of its tenant's by name, or several to be merged.

A name that was registered when the job was accepted comes with its version, and means nothing else
any more. Raises nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorabatch.job import MergedAdapters
from lorabatch.ledger import Claim

__all__ = ["Wanted", "WantedMerge", "wanted_by"]


@dataclass(frozen=True)
class Wanted:
    """`version` None: whatever the name stands for when the job is prepared."""

    tenant: str
    adapter_id: str
    version: str | None = None


@dataclass(frozen=True)
class WantedMerge:
    """`parts` are those of `spec.ids`, in order."""

    spec: MergedAdapters
    parts: tuple[Wanted, ...]

    @property
    def adapter_id(self) -> str:
        return self.spec.name


def wanted_by(claim: Claim) -> Wanted | WantedMerge | None:
    """None: the base model."""
    job, versions = claim.job, claim.adapter_versions
    if job.merged_adapters is not None:
        ids = job.merged_adapters.ids
        parts = tuple(Wanted(job.tenant, name, versions.get(name)) for name in ids)
        return WantedMerge(job.merged_adapters, parts)
    if job.adapter_id is None:
        return None
    return Wanted(job.tenant, job.adapter_id, versions.get(job.adapter_id))
