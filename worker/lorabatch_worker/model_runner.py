"""The base model as a function from a step to logits.

Owns the model, its KV cache and its LoRA sites. The model is called as transformers calls it,
without its cache protocol (the attention function reads the step from the context), or directly,
where it is one that direct.py knows. Raises UnsupportedModel when it is built on a model that it
would compute wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorabatch_worker.attention import IMPLEMENTATION, register
from lorabatch_worker.base_model import BaseModel
from lorabatch_worker.block_manager import BlockManager, PagedBlocks
from lorabatch_worker.decoder_layer import fuse_layers
from lorabatch_worker.direct import DirectModel
from lorabatch_worker.ends import ChangedEnds, ends_of, is_tied
from lorabatch_worker.graphs import Capture, CudaCapture, DecodeGraphs, GraphSizes
from lorabatch_worker.kv_cache import KVCache
from lorabatch_worker.lora_layers import attach_sites, own_weights
from lorabatch_worker.probe import (
    PROBE_BLOCKS,
    PROBE_ROW_BLOCKS,
    PROBE_ROWS,
    check_attention,
    check_config,
    eager_logits,
)
from lorabatch_worker.row_manager import RowBlocks
from lorabatch_worker.scheduler import Chunk
from lorabatch_worker.step import Step, StepContext, build_step

__all__ = ["ModelRunner"]


class ModelRunner:
    """Runs micro-batches of one base model. Used from one thread at a time."""

    def __init__(
        self,
        base: BaseModel,
        kv_cache_tokens: int,
        block_size: int,
        adapter_slots: int,
        max_adapter_rank: int,
        max_seqs: int = 32,
        prefix_cache: bool = True,
        rows: bool | None = None,
        pool_rows: int | None = None,
        capture: Capture | None = None,
    ) -> None:
        """`rows`: whether the KV cache has a row for each sequence; None: on a CPU. `pool_rows`: as
        LoraSite's. `capture`: what records decode steps that need no rows; None: CUDA graphs where
        there are any."""
        check_config(base.model.config)
        self.base = base
        self.model: Any = base.model
        self.device = base.device
        self.context = StepContext()
        budget = max(-(-kv_cache_tokens // block_size), PROBE_BLOCKS)
        self.blocks: BlockManager
        row_blocks = 0
        if rows is False or (rows is None and self.device.type != "cpu"):
            self.blocks = PagedBlocks(1 + budget, block_size, prefix_cache)
        else:
            row_blocks = max(-(-base.max_context_tokens // block_size), PROBE_ROW_BLOCKS)
            count = max(max_seqs, PROBE_ROWS)
            self.blocks = RowBlocks(count, row_blocks, budget, block_size, prefix_cache)
        self.cache = KVCache(self.blocks.num_blocks, block_size, self.context, row_blocks)
        name = f"{IMPLEMENTATION}_{id(self.cache)}"
        attend = register(self.cache, name)
        self._keeps_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        wanted = eager_logits(base, block_size)
        self.vocabulary: int = wanted.shape[-1]
        tied = is_tied(self.model)
        self.layers = attach_sites(
            self.model, self.context, adapter_slots, max_adapter_rank, pool_rows
        )
        self.sites = {name: layer.site for name, layer in self.layers.items()}
        self.changed_ends = ChangedEnds(self.model, self.context, self.device)
        own_weights(self.model)
        self.ends = ends_of(self.model, tied)
        self.fused = fuse_layers(self.model, self.cache, attend)
        self.direct = DirectModel.of(self.model)
        self._make_current()
        self.graphs: DecodeGraphs | None = None
        check_attention(self, name, wanted)
        if capture is None and self.device.type == "cuda":
            capture = CudaCapture()
        if capture is not None and not row_blocks:
            sizes = GraphSizes(max_seqs, adapter_slots, block_size, base.max_context_tokens)
            self.graphs = DecodeGraphs(self._compute, sizes, self.device, capture)

    def warm_up(self, progress: Callable[[], None]) -> None:
        """Get ready to run steps on the thread that calls this; `progress` is called now and then.
        Takes seconds on a GPU."""
        self._make_current()
        if self.graphs is not None:
            self.graphs.warm_up(progress)

    @torch.inference_mode()
    def forward(self, chunks: list[Chunk]) -> Tensor:
        """Compute a plan's chunks: logits [n, vocabulary] of the n chunks that sample, wider where
        an adapter among them has added tokens. They hold until the next call; on a GPU they may
        still be in the making."""
        self.cache.apply(self.blocks.take_changes())
        changed = any(map(self._changes_ends, chunks))
        if self.graphs is not None and not changed:
            logits = self.graphs.run(chunks)
            if logits is not None:
                return logits
        rows = self.cache.row_blocks > 0
        step = build_step(chunks, self.blocks.block_size, self.device, rows)
        if not changed:
            return self._compute(step)
        step = self.changed_ends.enter(step)
        return self.changed_ends.leave(step, self._compute(step), self.vocabulary)

    def _changes_ends(self, chunk: Chunk) -> bool:
        return self.changed_ends.changes(chunk.sequence.slot)

    def settle(self) -> bool:
        """After a step that failed: wait until what it launched is over, so that its memory can be
        used again. False: the device takes no more work from this process, as after an access to
        memory that is not there."""
        if self.device.type != "cuda":
            return True
        for _ in range(2):  # an error of before may show here once
            try:
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()
            except RuntimeError:
                continue
            return True
        return False

    def _compute(self, step: Step) -> Tensor:
        self.context.enter(step)
        try:
            return self._transformers(step) if self.direct is None else self.direct(step)
        finally:
            self.context.enter(None)

    def _transformers(self, step: Step) -> Tensor:
        keep: dict[str, Any] = {"logits_to_keep": step.sample_index} if self._keeps_logits else {}
        logits: Tensor = self.model(
            input_ids=step.input_ids[None],
            position_ids=step.position_ids[None],
            use_cache=False,
            **keep,
        ).logits[0]
        return logits if self._keeps_logits else logits[step.sample_index]

    def _make_current(self) -> None:
        """Triton launches on the thread's current device."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
