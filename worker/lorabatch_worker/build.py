"""An engine of its parts, as the settings say. Raises LoraBatchError: no such model, no memory."""

from __future__ import annotations

from collections.abc import Callable

from lorabatch.registry import Registry
from lorabatch.settings import Settings
from lorabatch_worker.adapters.catalog import AdapterCatalog
from lorabatch_worker.adapters.slots import AdapterSlots
from lorabatch_worker.adapters.store import AdapterStore
from lorabatch_worker.allocator import keep_freed_memory
from lorabatch_worker.base_model import load_base_model
from lorabatch_worker.engine import Engine
from lorabatch_worker.fair_share import alike
from lorabatch_worker.model_runner import ModelRunner
from lorabatch_worker.scheduler import Scheduler
from lorabatch_worker.target import Shape, target_of
from lorabatch_worker.threads import cores

__all__ = ["build_engine"]

GPU_SLOTS = 8  # unless told otherwise: each takes memory for the largest rank, or part of a pool


def build_engine(
    settings: Settings,
    registry: Registry | None = None,
    weight_of: Callable[[str], float] = alike,
) -> Engine:
    """Load the base model and make an engine of it. Takes seconds. Without a registry it knows the
    configured adapters only."""
    base = load_base_model(settings)
    shape = Shape.of(base.model)  # before its layers are replaced
    on_cpu = base.device.type == "cpu"
    # A CPU's slots take no memory of their own: every sequence may have another adapter.
    slots = settings.adapter_slots or (settings.max_seqs if on_cpu else GPU_SLOTS)
    pool_rows = None if on_cpu else settings.adapter_rank_rows or None
    runner = ModelRunner(
        base,
        settings.kv_cache_tokens,
        settings.block_size,
        slots,
        settings.max_adapter_rank,
        settings.max_seqs,
        settings.prefix_cache,
        pool_rows=pool_rows,
    )
    target = target_of(settings, base, shape, runner.layers.__getitem__, runner.ends)
    store = AdapterStore(AdapterCatalog(settings, registry), target, settings.adapter_cache_bytes)
    scheduler = Scheduler(
        runner.blocks,
        AdapterSlots(runner.sites, slots, pool_rows, runner.changed_ends),
        settings.max_seqs,
        settings.max_step_tokens,
        settings.age_cap_s,
        weight_of=weight_of,
    )
    if on_cpu:
        keep_freed_memory()
    threads = settings.threads or cores()
    return Engine(base, runner, scheduler, store, threads, settings.in_hand // 2)
