"""A scheduler without a model: sequences to put in, and steps played as the engine would."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from lorabatch import Job
from lorabatch_kernels import LoraWeights
from lorabatch_worker.adapters.slots import AdapterSlots
from lorabatch_worker.adapters.weights import Adapter
from lorabatch_worker.block_manager import BlockManager, PagedBlocks
from lorabatch_worker.row_manager import RowBlocks
from lorabatch_worker.scheduler import Chunk, Scheduler
from lorabatch_worker.sequence import Sequence
from tests.models import claim

BLOCK = 4
EOS = frozenset({-1})


def adapter(name: str | None) -> Adapter | None:
    """One of `name`'s rank: the number at its end, if there is one."""
    if name is None:
        return None
    rank = int(name.rpartition("-r")[2]) if "-r" in name else 0
    weights = (
        {"q": LoraWeights.pack(torch.empty(rank, 1), torch.empty(1, rank), 1.0)} if rank else {}
    )
    return Adapter(name, f"version of {name}", weights, None)


def sequence(
    job_id: str,
    prompt: int = 3,
    new: int = 4,
    name: str | None = None,
    priority: int = 0,
    tenant: str = "t",
    first: int = 0,
) -> Sequence:
    """Its prompt is first, first + 1, ..."""
    sampling: Any = {"max_new_tokens": new}
    job = Job(job_id=job_id, prompt="-", priority=priority, tenant=tenant, sampling_params=sampling)
    ids = list(range(first, first + prompt))
    return Sequence(claim(job), ids, adapter(name), waiting_since_s=time.monotonic())


LAYOUT = {"rows": False}
"""Which manager `scheduler` makes: rows, as on a CPU, or single blocks, as on a GPU."""


def scheduler(
    max_seqs: int = 4,
    step_tokens: int = 16,
    blocks: int = 32,
    slots: int = 2,
    age_cap_s: float = 5.0,
    rows: bool | None = None,
    pool_rows: int | None = None,
    weights: Mapping[str, float] | None = None,
    quantum: int | None = None,
) -> Scheduler:
    """`weights` of tenants, 1.0 of all others."""
    manager: BlockManager = PagedBlocks(1 + blocks, BLOCK)
    if LAYOUT["rows"] if rows is None else rows:
        manager = RowBlocks(max_seqs, blocks, blocks, BLOCK)
    return Scheduler(
        manager,
        AdapterSlots({}, slots, pool_rows),
        max_seqs,
        step_tokens,
        age_cap_s,
        weight_of=lambda tenant: (weights or {}).get(tenant, 1.0),
        quantum_tokens=quantum,
    )


def play(s: Scheduler, chunks: list[Chunk]) -> list[Sequence]:
    """Do what the engine does after a step: the sequences that ended."""
    for chunk in chunks:
        chunk.sequence.computed = chunk.end
        s.blocks.computed(chunk.sequence, chunk.start)
        if chunk.samples:
            chunk.sequence.append(7, EOS)
    done = [c.sequence for c in chunks if c.sequence.finish_reason is not None]
    for ended in done:
        s.remove(ended.job_id, keep=True)
    return done


def run(s: Scheduler, steps: int = 10_000) -> list[str]:
    """Job ids in the order in which they were admitted."""
    order: list[str] = []
    for _ in range(steps):
        chunks, admitted = s.plan()
        order += [a.job_id for a in admitted]
        play(s, chunks)
        if not (s.running or s.waiting):
            return order
    raise AssertionError(f"still there after {steps} steps: {list(s.waiting)} {list(s.running)}")
