"""Prefix cache and preemption on a tiny model: less is computed, and the tokens stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorabatch import Job, Result
from tests.desk import Desk, engine_for

STORY = "Once upon a time there was a river that ran past a mill and a garden. " * 3

Start = Callable[..., Desk]


@pytest.fixture
def start(tiny_folder: Path, tiny_adapters: dict[str, Path], home: Path) -> Iterator[Start]:
    desks = []

    def make(**fields: Any) -> Desk:
        adapters = ",".join(f"{name}={path}" for name, path in tiny_adapters.items())
        desks.append(Desk(engine_for(tiny_folder, home, adapters=adapters, **fields)))
        return desks[-1]

    yield make
    for desk in desks:
        desk.engine.drain(0)


def jobs(names: list[str | None], new: int = 8) -> list[Job]:
    """Prompts that begin alike and end differently, two tenants, greedy and sampled."""
    return [
        Job(
            job_id=f"{name}-{tenant}-{n}",
            tenant=tenant,
            adapter_id=name,
            prompt=STORY + end,
            sampling_params={
                "max_new_tokens": new,
                "ignore_eos": True,
                "temperature": float(n == 2),
                "seed": n,
            },
        )
        for name in names
        for tenant in ("acme", "bolt")
        for n, end in enumerate(("The miller", "One day", "And then", ""))
    ]


def tokens(results: dict[str, Result]) -> dict[str, tuple[int, ...]]:
    return {job_id: result.token_ids for job_id, result in results.items()}


@pytest.mark.parametrize("fields", [{}, {"max_seqs": 3}, {"block_size": 5, "max_step_tokens": 40}])
def test_a_shared_beginning_is_counted_and_changes_no_token(
    start: Start, tiny_adapters: dict[str, Path], fields: dict[str, Any]
) -> None:
    asked = jobs([None, *tiny_adapters])
    plain = start(prefix_cache=False, **fields).run(*asked)
    cached = start(**fields).run(*asked)
    assert tokens(cached) == tokens(plain)
    assert {r.usage.cached_tokens for r in plain.values()} == {0}
    for job in asked[::4]:  # of one adapter and tenant
        alike = [job_id for job_id in cached if job_id.startswith(job.job_id[:-1])]
        assert min(cached[job_id].usage.cached_tokens for job_id in alike) == 0, "one computes it"
    # How often more than one does depends on which rows are needed again in between.
    saved = sum(r.usage.cached_tokens for r in cached.values())
    assert saved > 0.3 * sum(r.usage.prompt_tokens for r in cached.values())


def test_jobs_that_outgrow_the_cache_give_way_and_keep_their_tokens(start: Start) -> None:
    asked = jobs([None], new=100)
    roomy = start(max_seqs=8, max_context_tokens=256).run(*asked)
    desk = start(max_seqs=8, max_context_tokens=256, kv_cache_tokens=560)
    tight = desk.run(*asked)
    assert tokens(tight) == tokens(roomy)
    load = desk.engine.load
    assert load["preemptions"] > 0
    assert sorted(desk.started) == sorted(job.job_id for job in asked), "each began once"
    scheduler = desk.engine.scheduler
    assert scheduler.blocks.free == scheduler.blocks.capacity


def test_memory_stays_within_the_budget(start: Start) -> None:
    """Rows that held long jobs give their pages back to those that need them now."""
    desk = start(max_seqs=8, max_context_tokens=256, kv_cache_tokens=512, block_size=16)
    blocks: Any = desk.engine.runner.blocks
    for round_ in range(3):
        desk.run(
            *(job.model_copy(update={"job_id": f"{round_}-{job.job_id}"}) for job in jobs([None]))
        )
        assert sum(blocks._held) <= blocks.capacity == 32
